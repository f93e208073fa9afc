"""Explanations are internalised where they help (hypothesis 2; paper, section 3.1 and Figure 5).

T_t is a task's definition with examples and their explanations, T_s the same without explanations, f the identity,
and D the task's own inputs beyond the test instances. For each task: how much explanations help in the prompt
(in-context margin), against how much distilling them helps (distillation margin).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..distill import Context, identity
from ..metrics import correlation
from . import differs
from .inputs import pool
from .instruction_eval import TEST, with_explanations, without_explanations
from .instruction_tasks import PAPER_SCALE, TaskSettings
from .instructions import Instructions
from .natural_instructions import NITask
from .report import Record, pm, scatter, seeds_of, table
from .settings import option


@dataclass
class ExplanationSettings(TaskSettings):
    """One seed of the experiment."""

    tasks: int = option(24, "spread over all kinds", least=3, unit="tasks")
    practice_inputs: int = option(512, "for each task", least=1, unit="inputs")


class Explanations(Instructions):
    """The correlation of the two margins."""

    TITLE = "Explanations are internalised where they help (hypothesis 2, Figure 5)"
    DIFFERS = differs.EXPLANATIONS
    Settings = ExplanationSettings
    SCALES = {"pocket": {}, "paper": {**PAPER_SCALE, "tasks": 10}}
    QUICK = dict(tasks=5, practice_inputs=256, test_instances=50)
    PAPER = {}

    @cached_property
    def chosen(self) -> list[NITask]:
        """So many tasks, spread over all kinds of them."""
        if len(self.tasks) < self.settings.tasks:
            raise ValueError(f"--tasks {self.settings.tasks}: there are only {len(self.tasks)} tasks")
        every = len(self.tasks) / self.settings.tasks
        return [self.tasks[int(i * every)] for i in range(self.settings.tasks)]

    stages = Instructions.task_stages  # no choice by margins

    def context(self, task: NITask) -> Context:
        inputs = pool([instance.input for instance in task.instances[TEST:]])
        return Context(inputs, with_explanations(task), without_explanations(task), identity)

    def figures(self) -> dict[str, Any]:
        scores = {task.name: self.folder.get(f"score-{task.name}") for task in self.chosen}
        points = {task: [s["teacher"] - s["before"], s["after"] - s["before"]] for task, s in scores.items()}
        return {"metrics": {"correlation": correlation(points.values())[0]}, "points": points}

    @classmethod
    def complete(cls, record: Record) -> Record:
        """With the correlation of the margins' means over the seeds."""
        r, p = correlation(record["points"].values())
        kept = sum(y for _, y in record["points"].values()) / (sum(x for x, _ in record["points"].values()) or 1)
        return record | {"mean_margins": {"correlation": round(r, 3), "p_value": p, "share_kept": round(kept, 3)}}

    @classmethod
    def plot(cls, record: Record, path: Path) -> bool:
        title = f"{seeds_of(record)}: r = {record['mean_margins']['correlation']:.2f}"
        return scatter(record["points"], path, title, "in-context margin (Rouge-L)", "distillation margin (Rouge-L)")

    @classmethod
    def table(cls, record: Record) -> str:
        mean, points = record["mean_margins"], record["points"]
        rows = [[task, f"{x:.1f}", f"{y:.1f}"] for task, (x, y) in points.items()]
        return (f"Correlation of in-context and distillation margin over {len(points)} tasks, {seeds_of(record)}, margins "
                f"averaged over the seeds: r = {mean['correlation']:.2f}, p ≤ {mean['p_value']:.5f} (one-sided, by "
                f"permutation); each seed by itself: r = {pm(record['metrics']['correlation'], 2)}\n\n"
                + table(["task", "in-context margin", "distillation margin"], rows))

    @classmethod
    def headline(cls, record: Record) -> str:
        return f"margins in the prompt and after distilling correlate over {len(record['points'])} tasks: r = {record['mean_margins']['correlation']:.2f}"
