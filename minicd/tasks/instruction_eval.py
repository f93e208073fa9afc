"""How well a model does on Natural Instructions: prompts, scores, and eval.py's questions (section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np
from torch import nn

from ..distill import Template
from ..metrics import exact_match, rouge_l
from ..sampling import generate
from ..tokenizer import TextTokenizer
from .inputs import tell_unknown_words
from .natural_instructions import Instance, NITask, find_tasks, instruction_prompt, load_folder, load_task
from .settings import EvalSettings, beside, option

DATA = "data/instructions/test"
TEST = 100  # the first instances of a task are for tests, the others for choosing tasks and for practice
CHOSEN = option("task501,task502,task503,task504", "the tasks: how their file names begin, between commas")


def with_explanations(task: NITask) -> Template:
    return lambda text: instruction_prompt(task, text)


def without_explanations(task: NITask) -> Template:
    return lambda text: instruction_prompt(task, text, explanations=False)


def bare(text: str) -> str:
    return text


PROMPTS: dict[str, Callable[[NITask], Template]] = {
    "full": with_explanations, "without_explanations": without_explanations, "bare": lambda task: bare}


def numbered(number: int) -> Template:
    """T_s: the student sees the task's number and the input."""
    return lambda text: f"task {number} : {text}"


def answers(model: nn.Module, tokenizer: TextTokenizer, prompts: list[str], settings: Any,
            name: str = "") -> list[list[int]]:
    """Greedy completions."""
    return generate(model, tokenizer.encode_all(prompts), settings.max_new_tokens, temperature=0,
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
    return {task.name: {name: rouge(task, prompt(task)) for name, prompt in PROMPTS.items()}
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

    data: str = option(DATA, "a task file, or a folder of them")
    test_instances: int = option(TEST, "of each task", least=1, most=TEST, unit="instances")
    max_new_tokens: int = option(12, "longest completion", least=1, most=4096, unit="tokens")


@dataclass
class TaskIdEval(TaskEval):
    """How eval.py examines a model that knows tasks by their numbers."""

    chosen: str = CHOSEN


def ask(model: nn.Module, tokenizer: TextTokenizer, question: str, settings: TaskEval) -> str:
    """`eval.py --ask PROMPT`: the completion."""
    tell_unknown_words(tokenizer, question)
    return tokenizer.decode(answers(model, tokenizer, [question], settings)[0])


def examine(model: nn.Module, tokenizer: TextTokenizer, settings: TaskEval, folder: Path) -> str:
    """`eval.py`: Rouge-L of every task under each of the three prompts."""
    path = Path(beside(settings.data))
    tasks = [load_task(path)] if path.is_file() else load_folder(path)
    rows = rouge_by_prompt(model, tokenizer, tasks, settings.test_instances, settings)
    rows["mean"] = {name: float(np.mean([row[name] for row in rows.values()])) for name in PROMPTS}
    width = max(map(len, rows))
    return "\n".join(f"{task:{width}}  " + ", ".join(f"{name} {value:.1f}" for name, value in row.items())
                     for task, row in rows.items())


def examine_ids(model: nn.Module, tokenizer: TextTokenizer, settings: TaskIdEval, folder: Path) -> str:
    """`eval.py --task task_ids`: accuracy of each task under each number."""
    tasks = find_tasks(Path(beside(settings.data)), settings.chosen)
    def percent(task: NITask, number: int) -> float:
        return accuracy(model, tokenizer, numbered(number), task, settings)
    return "\n".join(f"{task.name}: " + ", ".join(
        f"task {i} {percent(task, i):.1f} %" for i in range(len(tasks))) for task in tasks)
