"""Tasks are associated with ids, then with other ids (hypothesis 3; paper, section 3.1, Tables 1 and 6).

Four classification tasks. T_t is a task's instruction, T_s only its number. In the "naive" variant a teacher
sees only the inputs of its own task, and the student may learn the kind of input, not the number. In the
"mixed" one every teacher sees the inputs of all tasks. A second round shuffles the numbers, and the last
student goes on: taught by the base (sequential), or by itself as it was then (recursive).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Iterator

import numpy as np
from torch import nn

from ..distill import Context, Template, identity
from ..metrics import association
from ..rounds import RoundSettings
from ..runtime.files import copy_tensors
from .parts import differs
from .parts.inputs import derangement, pool
from .parts.instruction_eval import CHOSEN, NAMES, TEST, TaskIdEval, examine_ids, numbered, with_explanations
from .parts.instruction_tasks import PAPER_SCALE, SMOLLM2, TaskExperiment, TaskSettings, untested
from .parts.natural_instructions import NITask, find_tasks
from .report import Record, pm, seeds_of, table
from .run import Stage
from .settings import option

REAL = "task1393,task242,task738,task828"  # each has two labels of its own; the paper has the first two, too
ROUNDS = [("naive", 1), ("naive", 2), ("mixed", 1), ("mixed", 2), ("mixed_recursive", 2)]
ROWS = {"teacher": ("teacher",), "student before": ("before_correct", "before_wrong"),
        **{f"{variant.replace('_', ', ')}, round {n}": (f"{variant}_correct_{n}", f"{variant}_wrong_{n}")
           for variant, n in ROUNDS}}


@dataclass
class TaskIdSettings(TaskSettings):
    """One seed of the experiment."""

    chosen: str = option(CHOSEN, NAMES)


class TaskIds(TaskExperiment):
    """Accuracy with a task's own number, and with the others'."""

    TITLE = "Tasks are associated with ids, then with others (hypothesis 3, Tables 1 and 6)"
    DIFFERS = differs.TASK_IDS
    Settings, Eval, examine = TaskIdSettings, TaskIdEval, staticmethod(examine_ids)
    SCALES = {"pocket": {}, "paper": PAPER_SCALE, "smollm2": {**SMOLLM2, "chosen": REAL}}
    QUICK = dict(practice_inputs=384, test_instances=25)
    # Means of Table 6: accuracy with the right and with a wrong number. Round 2, after the shuffle: Table 1.
    PAPER = {"teacher": 81, "before_correct": 49, "before_wrong": 48,
             "naive_correct_1": 63, "naive_wrong_1": 59, "naive_correct_2": 68, "naive_wrong_2": 61,
             "mixed_correct_1": 69, "mixed_wrong_1": 15, "mixed_correct_2": 70, "mixed_wrong_2": 16}

    @cached_property
    def tasks(self) -> list[NITask]:
        return find_tasks(self.data, self.settings.chosen, more_than=TEST)

    @cached_property
    def numbers(self) -> list[list[int]]:
        """The numbers of the tasks in each round."""
        n = len(self.tasks)
        return [list(range(n)), derangement(n, np.random.default_rng((self.seed, 77)))]

    def contexts(self, numbers: list[int], mixed: bool) -> list[Context]:
        """One round: the task at i is to be called numbers[i]."""
        inputs = [untested(task) for task in self.tasks]
        everyone = pool([text for texts in inputs for text in texts])
        draws = [everyone if mixed else pool(own) for own in inputs]
        return [Context(draw, with_explanations(task), self.prompt(number), identity)
                for draw, task, number in zip(draws, self.tasks, numbers)]

    def distils(self) -> tuple[Context, RoundSettings]:
        return self.contexts(self.numbers[0], True)[0], self.settings.rounds()

    def prompt(self, number: int) -> Template:
        return numbered(number, self.settings)

    def stages(self) -> Iterator[Stage]:
        yield self.example(lambda: self.contexts(self.numbers[0], True)[0])
        yield Stage("teacher", lambda: {
            "teacher": [self.accuracy(self.base, with_explanations(task), task) for task in self.tasks]})
        yield Stage("before", lambda: self.scores(self.base, "before_{}"))
        for variant, n in ROUNDS:
            student, first = f"{variant}/student-{n}", f"{variant.split('_')[0]}/student-1"
            yield Stage(student, partial(self.student, variant, n), (first,) if n > 1 else ())
            yield Stage(f"{variant}-{n}", lambda s=student, v=variant, n=n: self.scores(
                self.folder.get(s), f"{v}_{{}}_{n}", n), (student,))

    def student(self, variant: str, n: int) -> nn.Module:
        """The student after n rounds. The recursive one goes on from the first mixed round."""
        if variant == "mixed_recursive":
            first, own = (self.folder.path / name / "round-0" / "student.safetensors"
                          for name in ("mixed", variant))
            copy_tensors(first, own)
        schedule = [self.contexts(numbers, variant != "naive") for numbers in self.numbers[:n]]
        return self.distill_rounds(variant, schedule, self.seed, recursive=variant == "mixed_recursive")

    def scores(self, model: nn.Module, name: str, n: int = 1) -> dict[str, list[float]]:
        """Each task's accuracy with its own number of round n, and its mean accuracy with the others'."""
        found = [[self.accuracy(model, self.prompt(i), t) for i in self.numbers[n - 1]] for t in self.tasks]
        correct, wrong = association(np.array(found))
        return {name.format("correct"): correct.tolist(), name.format("wrong"): wrong.tolist()}

    def figures(self) -> dict[str, Any]:
        """Row of the table → the mean over the tasks, and each."""
        rows, names = {}, [task.name for task in self.tasks]
        for stage in ["teacher", "before", *(f"{variant}-{n}" for variant, n in ROUNDS)]:
            rows |= self.folder.get(stage)
        return {"metrics": {row: float(np.mean(values)) for row, values in rows.items()},
                "by_task": {row: dict(zip(names, values)) for row, values in rows.items()}}

    @classmethod
    def table(cls, record: Record) -> str:
        """Beside Tables 1 and 6, then task by task."""
        metrics, by_task, tasks = record["metrics"], record["by_task"], list(record["by_task"]["teacher"])
        means = [[title, *(pm(metrics[name]) for name in names), *[""] * (2 - len(names)),
                  *(record["paper"].get(name, "") for name in names), *[""] * (2 - len(names))]
                 for title, names in ROWS.items()]
        each = [[title, *(" / ".join(f"{by_task[name][task]:.0f}" for name in names) for task in tasks)]
                for title, names in ROWS.items()]
        head = ["", "right number", "wrong number", "paper, right", "paper, wrong"]
        return "\n\n".join([f"Accuracy on {len(tasks)} classification tasks, %, {seeds_of(record)}",
                            table(head, means), table(["right / wrong number", *tasks], each)])

    @classmethod
    def headline(cls, record: Record) -> str:
        right, wrong, teacher = (pm(record["metrics"][name]) for name in (
            "mixed_correct_2", "mixed_wrong_2", "teacher"))
        return (f"after the shuffle {right} % by the right number, {wrong} by a wrong one, teacher {teacher} "
                "(paper: 70, 16, 81)")
