"""Instructions are internalised (hypothesis 1; paper, section 3.1).

T_t is a task's definition with 2 positive and 2 negative examples and their explanations; T_s is the bare
input, f the identity. D is the model itself, with a few-shot prompt for more inputs. Each task has its own
student. The score is Rouge-L over a task's first 100 instances, which Natural Instructions keeps for tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Iterator

import numpy as np
from torch import nn

from ..distill import Context, combine_seeds, identity
from . import differs
from .inputs import few_shot_inputs
from .instruction_eval import TEST, bare, with_explanations, without_explanations
from .instruction_tasks import PAPER_SCALE, TaskExperiment, TaskSettings
from .natural_instructions import NITask
from .report import Record, against_paper, pm, seeds_of, table
from .run import Stage
from .settings import option

ROWS = {"teacher": "teacher, instruction in the prompt", "before": "student before",
        "after": "**student after**", "token_ratio": "tokens at inference, teacher ÷ student"}


def chosen_tasks(tasks: list[NITask], margins: list[float], n: int) -> list[NITask]:
    """Half with the largest margins, half with margins nearest to 0 (paper, section 3.1)."""
    if len(tasks) < n:
        raise ValueError(f"{n} tasks are asked for, but there are only {len(tasks)}")
    order = sorted(range(len(tasks)), key=lambda i: -margins[i])
    most, rest = order[: n // 2], order[n // 2 :]
    least = sorted(rest, key=lambda i: abs(margins[i]))[: n - n // 2]
    return [tasks[i] for i in [*most, *least]]


@dataclass
class InstructionSettings(TaskSettings):
    """One seed of the experiment."""

    tasks: int = option(10, "one half is helped most by explanations, the other least", least=1, unit="tasks")
    shots: int = option(4, "shown to the model that is asked for more", least=1, unit="example inputs")
    max_input_tokens: int = option(128, "longest input that it may write", least=1, unit="tokens")


class Instructions(TaskExperiment):
    """Rouge-L on ten tasks."""

    TITLE = "Instructions are internalised (hypothesis 1)"
    DIFFERS = differs.INSTRUCTIONS
    Settings = InstructionSettings
    SCALES = {"pocket": {}, "paper": PAPER_SCALE}
    QUICK = dict(tasks=3, practice_inputs=512, test_instances=50)
    PAPER = {"teacher": 43.4, "before": 9.0, "after": 34.7, "token_ratio": 11.1}

    def stages(self) -> Iterator[Stage]:
        """The margins choose the tasks."""
        yield Stage("margins", self.margins)
        if self.folder.file("margins"):
            yield from self.task_stages()

    def task_stages(self) -> Iterator[Stage]:
        yield self.example(lambda: self.context(self.chosen[0]))
        for task in self.chosen:
            yield Stage(f"{task.name}/student", partial(self.student, task))
            yield Stage(f"score-{task.name}", partial(self.scores, task), (f"{task.name}/student",),
                        lambda s, name=task.name: f"{name}: " + ", ".join(
                            f"{row} {s[row]:.1f}" for row in ("teacher", "before", "after")))

    @cached_property
    def chosen(self) -> list[NITask]:
        return chosen_tasks(self.tasks, self.folder.get("margins"), self.settings.tasks)

    def margins(self) -> list[float]:
        """By how much explanations raise the teacher's Rouge-L on each task, outside the test instances."""
        margins = []
        for task in self.tasks:
            instances = task.instances[TEST : TEST + 50]
            if not instances:
                raise ValueError(f"task {task.name} has only {len(task.instances)} instances, "
                                 f"of which {TEST} are for tests")
            full, less = (self.score(self.base, template(task), instances, f"margin of {task.name}")["rouge"]
                          for template in (with_explanations, without_explanations))
            margins.append(full - less)
        return margins

    def context(self, task: NITask) -> Context:
        s, given = self.settings, [example.input for example in [*task.positives, *task.negatives]]
        tests = {instance.input for instance in task.instances[:TEST]}
        new = few_shot_inputs(self.base, self.tokenizer, given, s.shots, s.max_input_tokens, tests,
                              s.precision)
        return Context(new, with_explanations(task), bare, identity)

    def student(self, task: NITask) -> nn.Module:
        seed = combine_seeds((self.seed, self.tasks.index(task)))
        return self.distill_rounds(task.name, [[self.context(task)]], seed)

    def scores(self, task: NITask) -> dict[str, float]:
        """Teacher, student before and after, and the ratio of tokens."""
        context, instances = self.context(task), task.instances[: self.settings.test_instances]
        models = {"teacher": (self.base, context.teacher), "before": (self.base, context.student),
                  "after": (self.folder.get(f"{task.name}/student"), context.student)}
        found = {row: self.score(*how, instances, f"{row} on {task.name}") for row, how in models.items()}
        return {**{row: score["rouge"] for row, score in found.items()},
                "token_ratio": found["teacher"]["tokens"] / found["after"]["tokens"]}

    def figures(self) -> dict[str, Any]:
        by_task = {task.name: self.folder.get(f"score-{task.name}") for task in self.chosen}
        metrics = {row: float(np.mean([task[row] for task in by_task.values()])) for row in ROWS}
        return {"metrics": metrics, "by_task": by_task}

    @classmethod
    def table(cls, record: Record) -> str:
        """Beside the paper's figures, then task by task."""
        rows = [[task, *(f"{row[name]:.1f}" for name in ROWS)] for task, row in record["by_task"].items()]
        return "\n\n".join([f"Rouge-L, mean of {len(rows)} tasks, {seeds_of(record)}",
                            against_paper(record, ROWS),
                            table(["task", "teacher", "before", "after", "tokens ÷"], rows)])

    @classmethod
    def headline(cls, record: Record) -> str:
        after, teacher, before = (pm(record["metrics"][name]) for name in ("after", "teacher", "before"))
        return (f"Rouge-L {after} on the bare input, {teacher} with the instruction, {before} before "
                "(paper: 34.7, 43.4, 9.0)")
