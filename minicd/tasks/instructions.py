"""Instructions are internalised (hypothesis 1; paper, section 3.1), and what its two sister experiments share.

T_t is a task's definition with 2 positive and 2 negative examples and their explanations, T_s the bare input, f the identity,
and D the model itself, few-shot prompted for more inputs. Each task is distilled by itself; the score is Rouge-L over the
first 100 instances of a task, which Natural Instructions keeps for tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import nn

from ..hf.checkpoint import load, save
from ..distill import Context, combine_seeds, identity
from ..rounds import RoundSettings, rounds
from .experiment import RunFolder, option, record, seed_folders, write_record
from ..metrics import rouge_l
from .report import instructions_table, minutes_line
from ..sampling import generate
from ..tokenizer import TextTokenizer
from ..training import FitSettings
from .loss_options import LossOptions
from .natural_instructions import Instance, NITask, inputs_prompt, instruction_prompt, load_folder, load_task

PAPER = {"teacher": 43.4, "before": 9.0, "after": 34.7, "token_ratio": 11.1}
DATA = "data/instructions/test"
TEST = 100  # the first instances of a task are for tests, the others for choosing tasks and for practice


@dataclass
class InstructionSettings(LossOptions):
    """One seed of an experiment on instructions. The defaults are the pocket scale; PAPER_SCALE is the paper's own recipe."""

    model: str = option("data/pocket-instructions", "folder or hub id of the instruction-tuned model")
    data: str = option(DATA, "folder of Natural-Instructions task files, the pocket's or the real ones")
    scale: str = option("pocket", "pocket, or paper: the paper's own recipe (give it --model and --data)")
    tasks: int = option(10, "tasks: half of them those which explanations help most, half those which they help least")
    practice_inputs: int = option(1024, "practice inputs for each context")
    shots: int = option(4, "example inputs in the prompt with which the model is asked for more")
    epochs: float = option(3.0, "passes over the practice set")
    lr: float = option(1e-3, "learning rate")
    batch: int = option(32, "batch size")
    warmup: float = option(0.05, "share of the steps with a growing learning rate")
    decay: float = option(0.3, "share of the steps, at the end, with a falling learning rate")
    clip: float = option(1.0, "largest gradient norm; 0: no clipping")
    optimiser: str = option("adamw", "adamw (the paper's), or muon for the matrices inside the layers", choices=("adamw", "muon"))
    max_new_tokens: int = option(12, "longest answer")
    test_instances: int = option(TEST, "test instances of each task")

    def rounds(self) -> RoundSettings:
        fit = FitSettings(self.lr, self.batch, self.warmup, self.decay, self.clip, self.loss, self.jsd_beta,
                          optimiser=self.optimiser)
        return RoundSettings(self.practice_settings(self.max_new_tokens), fit, self.practice_inputs, self.epochs, self.on_policy)


Settings = InstructionSettings
PAPER_SCALE = dict(scale="paper", practice_inputs=4096, epochs=1.0, lr=1e-5, batch=16, warmup=0.0, decay=0.0, clip=0.0,
                   max_new_tokens=128)
SCALES = {"pocket": {}, "paper": PAPER_SCALE}
QUICK = dict(tasks=3, practice_inputs=512, test_instances=50)
Template = Callable[[str], str]


# --- D: where inputs come from ---


def few_shot_inputs(model: nn.Module, tokenizer: TextTokenizer, examples: list[str], settings: InstructionSettings,
                    forbidden: set[str] = frozenset()) -> Callable[[int, np.random.Generator], list[str]]:
    """D as the model itself: shown `shots` of the example inputs in a random order, it writes one more.

    Raises ValueError where nine tenths of what it writes is empty or forbidden (a test input).
    """
    def draw(n: int, rng: np.random.Generator) -> list[str]:
        generator = torch.Generator(next(model.parameters()).device).manual_seed(int(rng.integers(2**62)))
        found: list[str] = []
        for _ in range(10):
            chosen = [rng.permutation(examples)[: settings.shots] for _ in range(n - len(found))]
            prompts = tokenizer.encode_all([inputs_prompt(shown) for shown in chosen])
            written = generate(model, prompts, settings.max_new_tokens, generator=generator, precision="auto")
            texts = [tokenizer.decode(tokens).strip() for tokens in written]
            found += [text for text in texts if text and text not in forbidden]
            if len(found) == n:
                return found
        raise ValueError(f"asked for {n} inputs, the model wrote only {len(found)} that can be used; choose another --model")
    return draw


def pool(texts: list[str]) -> Callable[[int, np.random.Generator], list[str]]:
    """D as a pool of unlabelled inputs, drawn with repeats."""
    return lambda n, rng: [texts[i] for i in rng.integers(len(texts), size=n)]


# --- T and the metric ---


def with_explanations(task: NITask) -> Template:
    return lambda text: instruction_prompt(task, text)


def without_explanations(task: NITask) -> Template:
    return lambda text: instruction_prompt(task, text, explanations=False)


def bare(text: str) -> str:
    return text


PROMPTS = {"full": with_explanations, "without_explanations": without_explanations, "bare": lambda task: bare}


@dataclass
class Score:
    rouge: float  # Rouge-L, percent
    tokens: float  # mean tokens of prompt and answer


def score(model: nn.Module, tokenizer: TextTokenizer, template: Template, instances: list[Instance],
          settings: InstructionSettings) -> Score:
    """Greedy answers under `template`, judged by Rouge-L."""
    prompts = tokenizer.encode_all([template(instance.input) for instance in instances])
    answers = generate(model, prompts, settings.max_new_tokens, temperature=0, precision="auto")
    points = [rouge_l(tokenizer.decode(answer), instance.outputs) for answer, instance in zip(answers, instances)]
    return Score(100 * float(np.mean(points)), float(np.mean([len(p) + len(a) for p, a in zip(prompts, answers)])))


def rouge_by_prompt(model: nn.Module, tokenizer: TextTokenizer, tasks: list[NITask], instances: int,
                    settings: InstructionSettings) -> dict[str, dict[str, float]]:
    """Task → Rouge-L under each of the three prompts, on so many of its first instances."""
    return {task.name: {name: score(model, tokenizer, template(task), task.instances[:instances], settings).rouge
                        for name, template in PROMPTS.items()} for task in tasks}


def explanation_margins(model: nn.Module, tokenizer: TextTokenizer, tasks: list[NITask],
                        settings: InstructionSettings) -> list[float]:
    """By how much explanations help the teacher on each task, in Rouge-L, on instances that are not the tests'."""
    margins = []
    for task in tasks:
        instances = task.instances[TEST : TEST + 50]
        if not instances:
            raise ValueError(f"task {task.name} has only {len(task.instances)} instances, of which {TEST} are for tests")
        margins.append(score(model, tokenizer, with_explanations(task), instances, settings).rouge
                       - score(model, tokenizer, without_explanations(task), instances, settings).rouge)
    return margins


def chosen_tasks(tasks: list[NITask], margins: list[float], n: int) -> list[NITask]:
    """Half of them those with the largest margins, half those with margins nearest to 0 (paper, section 3.1)."""
    if len(tasks) < n:
        raise ValueError(f"{n} tasks are asked for, but there are only {len(tasks)}")
    order = sorted(range(len(tasks)), key=lambda i: -margins[i])
    most, rest = order[: n // 2], order[n // 2 :]
    least = sorted(rest, key=lambda i: abs(margins[i]))[: n - n // 2]
    return [tasks[i] for i in [*most, *least]]


# --- The experiment ---


class InstructionRun:
    """One seed: each task's practice, distillation and scores; what the folder already has is not done again."""

    def __init__(self, settings: InstructionSettings, seed: int, folder: RunFolder, device: torch.device):
        self.settings, self.seed, self.folder = settings, seed, folder
        self.base, self.tokenizer = load(settings.model, device)
        self.tasks = load_folder(Path(settings.data))

    def context(self, task: NITask) -> Context:
        examples = [example.input for example in [*task.positives, *task.negatives]]
        tests = {instance.input for instance in task.instances[:TEST]}
        inputs = few_shot_inputs(self.base, self.tokenizer, examples, self.settings, forbidden=tests)
        return Context(inputs, with_explanations(task), bare, identity)

    def chosen(self) -> list[NITask]:
        margins = self.folder.value("margins", lambda: explanation_margins(self.base, self.tokenizer, self.tasks, self.settings))
        return chosen_tasks(self.tasks, margins, self.settings.tasks)

    def run(self) -> dict[str, dict[str, float]]:
        """Task name → teacher, before, after, and the ratio of tokens."""
        chosen = self.chosen()
        print(show_example(self.base, self.tokenizer, self.context(chosen[0]), self.settings))
        return {task.name: self.folder.value(f"score-{task.name}", lambda task=task: self.distilled(task)) for task in chosen}

    def distilled(self, task: NITask) -> dict[str, float]:
        context, settings = self.context(task), self.settings
        seed = combine_seeds((self.seed, self.tasks.index(task)))
        folder = self.folder.path / task.name
        student = rounds(self.base, self.tokenizer, [[context]], settings.rounds(), seed=seed, folder=folder)
        save(student, self.tokenizer, folder / "student")
        instances = task.instances[: settings.test_instances]
        teacher = score(self.base, self.tokenizer, context.teacher, instances, settings)
        before, after = (score(model, self.tokenizer, context.student, instances, settings) for model in (self.base, student))
        print(f"{task.name}: teacher {teacher.rouge:.1f}, before {before.rouge:.1f}, after {after.rouge:.1f}")
        return {"teacher": teacher.rouge, "before": before.rouge, "after": after.rouge,
                "token_ratio": teacher.tokens / after.tokens}


def show_example(model: nn.Module, tokenizer: TextTokenizer, context: Context, settings: InstructionSettings) -> str:
    """One practice item, whole: what the teacher sees and says, and what the student is to say to what."""
    x = context.inputs(1, np.random.default_rng(0))[0]
    completion = generate(model, [tokenizer.encode(context.teachers[0](x))], settings.max_new_tokens,
                          generator=torch.Generator(next(model.parameters()).device))[0]
    kept = context.extract(completion)
    parts = {"teacher prompt": context.teachers[0](x), "completion": tokenizer.decode(completion),
             "extracted answer": tokenizer.decode(completion[kept]) if kept else "(none)", "student prompt": context.student(x)}
    lines = [line for title, text in parts.items() for line in (f"  {title}", *(f"    {line}" for line in text.splitlines()))]
    return "\n".join(["", "One practice item", *lines, ""])


def train(settings: InstructionSettings, seeds: list[int], out: Path, device: torch.device, publish: bool = False) -> None:
    """`train.py --task instructions`: every seed's tasks, then the table and the record."""
    folders = seed_folders(settings, seeds, out, device)
    by_seed = [InstructionRun(settings, seed, folder, device).run() for seed, folder in zip(seeds, folders)]
    metrics = {name: [float(np.mean([task[name] for task in tasks.values()])) for tasks in by_seed] for name in PAPER}
    by_task = {name: {key: round(float(np.mean([tasks[name][key] for tasks in by_seed if name in tasks])), 2) for key in PAPER}
               for name in dict.fromkeys(name for tasks in by_seed for name in tasks)}
    result = record("instructions", settings.scale, seeds, settings, folders, metrics, paper=PAPER, by_task=by_task)
    write_record(result, out, publish)
    print(f"\n{instructions_table(result)}\n\n{minutes_line(result)}\nStudents, practice sets and record.json: {out}")


def ask(model: nn.Module, tokenizer: TextTokenizer, arguments) -> str:
    """`eval.py --task instructions --ask PROMPT`: the completion."""
    longest = arguments.max_new_tokens or InstructionSettings.max_new_tokens
    return tokenizer.decode(generate(model, tokenizer.encode_all([arguments.ask]), longest, temperature=0, precision="auto")[0])


def test(model: nn.Module, tokenizer: TextTokenizer, arguments) -> None:
    """`eval.py --task instructions`: Rouge-L of every task under each of the three prompts."""
    settings = InstructionSettings(max_new_tokens=arguments.max_new_tokens or InstructionSettings.max_new_tokens)
    tasks = [load_task(arguments.data)] if arguments.data.is_file() else load_folder(arguments.data)
    table = rouge_by_prompt(model, tokenizer, tasks, arguments.test_instances, settings)
    table["mean"] = {name: float(np.mean([row[name] for row in table.values()])) for name in PROMPTS}
    width = max(map(len, table))
    for task, row in table.items():
        print(f"{task:{width}}  " + ", ".join(f"{name} {value:.1f}" for name, value in row.items()))
