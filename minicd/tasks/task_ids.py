"""Task ids are associated, and associated anew (hypothesis 3; paper, section 3.1, Tables 1 and 6).

Four classification tasks. T_t is a task's instruction, T_s only its number. In the "naive" variant the teacher of a task sees
inputs of that task alone, and the student may learn the kind of input instead of the number; in the "mixed" one every
teacher sees the inputs of all tasks. Then the numbers are shuffled and distilled again: from the base (sequential), and
from the last student (recursive).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..hf.checkpoint import load
from ..distill import Context, identity
from ..rounds import rounds
from .experiment import RunFolder, option, record, seed_folders, write_record
from ..metrics import association, exact_match
from .report import minutes_line, task_ids_table
from ..sampling import generate
from .instructions import PAPER_SCALE, TEST, InstructionSettings, Template, pool, show_example, with_explanations
from .natural_instructions import NITask, load_task

# Means of Table 6, accuracy with the right number and with a wrong one; those of round 2, after the shuffle, are Table 1.
PAPER = {"teacher": 81, "before_correct": 49, "before_wrong": 48,
         "naive_correct_1": 63, "naive_wrong_1": 59, "naive_correct_2": 68, "naive_wrong_2": 61,
         "mixed_correct_1": 69, "mixed_wrong_1": 15, "mixed_correct_2": 70, "mixed_wrong_2": 16}
CHOSEN = "task501,task502,task503,task504"


@dataclass
class TaskIdSettings(InstructionSettings):
    """One seed of the experiment."""

    chosen: str = option(CHOSEN, "the tasks: the beginnings of their file names, with commas between them")
    tasks: int = option(4, "how many tasks that are")


Settings = TaskIdSettings
SCALES = {"pocket": {}, "paper": PAPER_SCALE}
QUICK = dict(practice_inputs=384, test_instances=25)


def numbered(number: int) -> Template:
    """T_s: the student sees the task's number and the input."""
    return lambda text: f"task {number} : {text}"


def chosen_tasks(folder: Path, beginnings: str) -> list[NITask]:
    """Raises ValueError where a beginning names no file, or several."""
    tasks = []
    for beginning in filter(None, beginnings.split(",")):
        found = sorted(Path(folder).glob(f"{beginning.strip()}*.json"))
        if len(found) != 1:
            raise ValueError(f"{folder}: {len(found)} task files begin with {beginning.strip()!r}; one is needed")
        tasks.append(load_task(found[0]))
    if len(tasks) < 2:
        raise ValueError("--chosen needs two tasks or more, with commas between them")
    return tasks


def shuffled(n: int, seed: int) -> list[int]:
    """New numbers for the tasks 0…n-1, none of which keeps its own."""
    rng = np.random.default_rng((seed, 77))
    while True:
        order = rng.permutation(n)
        if (order != np.arange(n)).all():
            return order.tolist()


class TaskIdRun:
    """One seed of all variants."""

    def __init__(self, settings: TaskIdSettings, seed: int, folder: RunFolder, device: torch.device):
        self.settings, self.seed, self.folder = settings, seed, folder
        self.base, self.tokenizer = load(settings.model, device)
        self.tasks = chosen_tasks(Path(settings.data), settings.chosen)
        self.inputs = [[instance.input for instance in task.instances[TEST:]] for task in self.tasks]
        if not all(self.inputs):
            raise ValueError(f"every task needs more than {TEST} instances: the first {TEST} are for tests")

    def contexts(self, numbers: list[int], mixed: bool) -> list[Context]:
        """One round: the task at i is to be called numbers[i]."""
        everyone = pool([text for texts in self.inputs for text in texts])
        return [Context(everyone if mixed else pool(self.inputs[i]), with_explanations(task), numbered(numbers[i]), identity)
                for i, task in enumerate(self.tasks)]

    def accuracy(self, model: nn.Module, template: Template, task: NITask) -> float:
        """Percent of a task's test inputs that are answered with one of its labels for them."""
        instances = task.instances[: self.settings.test_instances]
        prompts = self.tokenizer.encode_all([template(instance.input) for instance in instances])
        answers = generate(model, prompts, self.settings.max_new_tokens, temperature=0, precision="auto")
        return 100 * float(np.mean([any(exact_match(self.tokenizer.decode(a), output) for output in instance.outputs)
                                    for a, instance in zip(answers, instances)]))

    def association(self, model: nn.Module, numbers: list[int]) -> dict[str, list[float]]:
        """Each task's accuracy with its own number, and its mean accuracy with the others'."""
        table = [[self.accuracy(model, numbered(number), task) for number in numbers] for task in self.tasks]
        correct, wrong = association(np.array(table))
        return {"correct": correct.tolist(), "wrong": wrong.tolist()}

    def run(self) -> dict[str, list[float]]:
        """Row of the table → a figure for each task."""
        first, second = list(range(len(self.tasks))), shuffled(len(self.tasks), self.seed)
        print(show_example(self.base, self.tokenizer, self.contexts(first, True)[0], self.settings))
        teacher = self.folder.value("teacher", lambda: [self.accuracy(self.base, with_explanations(t), t) for t in self.tasks])
        before = self.folder.value("before", lambda: self.association(self.base, first))
        result = {"teacher": teacher, "before_correct": before["correct"], "before_wrong": before["wrong"]}
        for variant, recursive in (("naive", False), ("mixed", False), ("mixed_recursive", True)):
            schedule = [self.contexts(numbers, variant != "naive") for numbers in (first, second)]
            for count, numbers in ((1, first), (2, second)):
                scores = self.folder.value(f"{variant}-{count}", lambda: self.association(
                    self.distilled(variant, schedule[:count], recursive), numbers))
                result |= {f"{variant}_{name}_{count}": value for name, value in scores.items()}
        return result

    def distilled(self, variant: str, schedule: list[list[Context]], recursive: bool) -> nn.Module:
        """The student after these rounds; a longer schedule goes on from a shorter one in the same folder."""
        print(f"{variant}, round {len(schedule)}")
        return rounds(self.base, self.tokenizer, schedule, self.settings.rounds(), recursive=recursive, seed=self.seed,
                      folder=self.folder.path / variant)


def train(settings: TaskIdSettings, seeds: list[int], out: Path, device: torch.device, publish: bool = False) -> None:
    """`train.py --task task_ids`: both variants, two rounds each, then the table and the record."""
    folders = seed_folders(settings, seeds, out, device)
    by_seed = [TaskIdRun(settings, seed, folder, device).run() for seed, folder in zip(seeds, folders)]
    metrics = {name: [float(np.mean(scores[name])) for scores in by_seed] for name in by_seed[0]}
    names = [task.name for task in chosen_tasks(Path(settings.data), settings.chosen)]
    by_task = {row: dict(zip(names, np.mean([scores[row] for scores in by_seed], axis=0).round(2).tolist())) for row in metrics}
    result = record("task_ids", settings.scale, seeds, settings, folders, metrics, paper=PAPER, by_task=by_task)
    write_record(result, out, publish)
    print(f"\n{task_ids_table(result)}\n\n{minutes_line(result)}\nStudents, practice sets and record.json: {out}")
