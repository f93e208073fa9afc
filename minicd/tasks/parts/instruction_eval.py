"""How well a model does on Natural Instructions: prompts, scores, and eval.py's questions (section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable

import numpy as np
from torch import nn

from ...decoder import DecoderConfig
from ...distill import Template
from ...metrics import exact_match, rouge_l
from ...sampling import generate
from ...tokenizer import TextTokenizer
from ..settings import EvalSettings, beside, option
from .inputs import tell_unknown_words
from .natural_instructions import Instance, NITask, find_tasks, instruction_prompt, load_folder, load_task

DATA = "data/instructions/test"
TEST = 100  # the first instances of a task are for tests, the others for choosing tasks and for practice
CHOSEN, NAMES = "task501,task502,task503,task504", "the tasks: how their file names begin, between commas"
MARK = "Output:"
PLAIN = f"the model is a plain language model: answers end with their line, bare inputs get a line {MARK!r}"
LONGEST = 12  # tokens of an answer, unless settings say otherwise
SHAPES: dict[str, dict[str, Any]] = {  # of the teacher's prompt; "full" is the paper's
    "full": {}, "without_explanations": {"explanations": False},
    "positives": {"explanations": False, "negatives": 0}, "definition": {"positives": 0, "negatives": 0}}


def instructed(task: NITask, shape: str) -> Template:
    """T_t: the task's definition, and as much of its examples as the shape has."""
    return partial(instruction_prompt, task, **SHAPES[shape])


def with_explanations(task: NITask) -> Template:
    return instructed(task, "full")


def without_explanations(task: NITask) -> Template:
    return instructed(task, "without_explanations")


def bare(text: str) -> str:
    return text


def marked(text: str) -> str:
    """The bare input for a plain language model, which has to see that it ends and the answer begins."""
    return text if text.endswith(MARK) else f"{text.strip()}\n{MARK}"


def bare_prompt(settings: Any) -> Template:
    return marked if settings.plain else bare


PROMPTS: dict[str, Callable[[NITask], Template]] = {
    "full": with_explanations, "without_explanations": without_explanations, "bare": lambda task: bare}


def numbered(number: int, settings: Any) -> Template:
    """T_s: the student sees the task's number and the input."""
    return lambda text: bare_prompt(settings)(f"task {number} : {text}")


def line_ends(tokenizer: TextTokenizer) -> list[int]:
    """The tokens that have a new line."""
    pieces = tokenizer.pieces(range(len(tokenizer)))
    return [i for i, piece in enumerate(pieces) if "\n" in piece or piece == "<0x0A>"]


def end_with_line(model: nn.Module, tokenizer: TextTokenizer) -> None:
    """Make every token with a new line one that ends a completion, as f does for a plain language model.

    After an answer it would go on with the next example. Copies of the model, saved ones too, stay like this.
    Raises ValueError where no token has a new line.
    """
    config, lines = model.config, line_ends(tokenizer)
    if not lines or not isinstance(config, DecoderConfig):
        raise ValueError("--plain is for decoders whose tokenizer has new lines, which this model is not")
    more = tuple(dict.fromkeys([*config.more_eos_token_ids, *lines]))
    ends = [i for i in (config.eos_token_id, *more) if i >= 0]
    source = {**config.source, "eos_token_id": ends}  # so that `save` writes all of them
    model.config = replace(config, more_eos_token_ids=more, source=source)


def answers(model: nn.Module, tokenizer: TextTokenizer, prompts: list[str], settings: Any,
            name: str = "") -> list[list[int]]:
    """Greedy completions."""
    return generate(model, tokenizer.encode_all(prompts), settings.max_new_tokens or LONGEST, temperature=0,
                    progress=name, precision=settings.precision)


def score(model: nn.Module, tokenizer: TextTokenizer, template: Template, instances: list[Instance],
          settings: Any, name: str = "") -> dict[str, float]:
    """Greedy answers under `template`: Rouge-L in percent, and mean number of tokens of prompt and answer."""
    prompts = [template(instance.input) for instance in instances]
    written = answers(model, tokenizer, prompts, settings, name)
    points = [rouge_l(tokenizer.decode(answer), instance.outputs)
              for answer, instance in zip(written, instances)]
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(tokenizer.encode_all(prompts), written)]
    return {"rouge": 100 * float(np.mean(points)), "tokens": float(np.mean(lengths))}


def rouge_by_prompt(model: nn.Module, tokenizer: TextTokenizer, tasks: list[NITask], instances: int,
                    settings: Any) -> dict[str, dict[str, float]]:
    """Task → Rouge-L under each of the three prompts, on its first instances."""
    def rouge(task: NITask, template: Template) -> float:
        return score(model, tokenizer, template, task.instances[:instances], settings, task.name)["rouge"]
    prompts = {**PROMPTS, "bare": lambda task: bare_prompt(settings)}
    return {task.name: {name: rouge(task, prompt(task)) for name, prompt in prompts.items()}
            for task in tasks}


def accuracy(model: nn.Module, tokenizer: TextTokenizer, template: Template, task: NITask,
             settings: Any) -> float:
    """Percent of a task's test inputs that the model answers with a right label."""
    instances = task.instances[: settings.test_instances]
    prompts = [template(instance.input) for instance in instances]
    texts = map(tokenizer.decode, answers(model, tokenizer, prompts, settings, task.name))
    return 100 * float(np.mean([any(exact_match(text, output) for output in instance.outputs)
                                for text, instance in zip(texts, instances)]))


# --- eval.py ---


@dataclass
class TaskEval(EvalSettings):
    """How eval.py examines a model on tasks of Natural Instructions."""

    data: str | None = option(None, f"a task file, or a folder of them; as in the run, or {DATA}")
    test_instances: int = option(TEST, "of each task", least=1, most=TEST, unit="instances")
    max_new_tokens: int | None = option(None, f"longest completion; as in the run, or {LONGEST} tokens",
                                        least=1, most=4096)
    plain: bool | None = option(None, PLAIN + "; as in the run, unless given")


@dataclass
class TaskIdEval(TaskEval):
    """How eval.py examines a model that knows tasks by their numbers."""

    chosen: str | None = option(None, f"{NAMES}; as in the run, or {CHOSEN}")


def prepare(model: nn.Module, tokenizer: TextTokenizer, settings: TaskEval) -> Template:
    """The model as `settings.plain` wants it, and how it is to be asked."""
    if settings.plain:
        end_with_line(model, tokenizer)
    return bare_prompt(settings)


def ask(model: nn.Module, tokenizer: TextTokenizer, question: str, settings: TaskEval) -> str:
    """`eval.py --ask PROMPT`: the completion."""
    question = prepare(model, tokenizer, settings)(question)
    tell_unknown_words(tokenizer, question)
    return tokenizer.decode(answers(model, tokenizer, [question], settings)[0])


def examine(model: nn.Module, tokenizer: TextTokenizer, settings: TaskEval, folder: Path) -> str:
    """`eval.py`: Rouge-L of every task under each of the three prompts."""
    prepare(model, tokenizer, settings)
    path = Path(beside(settings.data or DATA))
    tasks = [load_task(path)] if path.is_file() else load_folder(path)
    rows = rouge_by_prompt(model, tokenizer, tasks, settings.test_instances, settings)
    rows["mean"] = {name: float(np.mean([row[name] for row in rows.values()])) for name in PROMPTS}
    width = max(map(len, rows))
    return "\n".join(f"{task:{width}}  " + ", ".join(f"{name} {value:.1f}" for name, value in row.items())
                     for task, row in rows.items())


def examine_ids(model: nn.Module, tokenizer: TextTokenizer, settings: TaskIdEval, folder: Path) -> str:
    """`eval.py --task task_ids`: accuracy of each task under each number."""
    prepare(model, tokenizer, settings)
    tasks = find_tasks(Path(beside(settings.data or DATA)), settings.chosen or CHOSEN)
    def percent(task: NITask, number: int) -> float:
        return accuracy(model, tokenizer, numbered(number, settings), task, settings)
    return "\n".join(f"{task.name}: " + ", ".join(
        f"task {i} {percent(task, i):.1f} %" for i in range(len(tasks))) for task in tasks)
