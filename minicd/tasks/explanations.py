"""Explanations are internalised where they help (hypothesis 2; paper, section 3.1 and Figure 5).

T_t has a task's definition, examples and explanations, T_s no explanations, D the task's own inputs. How much
do explanations help in the prompt (in-context margin), and how much when distilled (distillation margin)?
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..distill import Context, identity
from ..metrics import correlation
from .instructions import Instructions
from .parts import differs
from .parts.instruction_eval import with_explanations, without_explanations
from .parts.instruction_tasks import PAPER_SCALE, SMOLLM2, TaskSettings
from .parts.natural_instructions import NITask
from .report import Record, pm, scatter, seeds_of, table
from .settings import option


@dataclass
class ExplanationSettings(TaskSettings):
    """One seed of the experiment."""

    tasks: int = option(24, "spread over all kinds", least=3, unit="tasks")
    practice_inputs: int = option(512, "for each task", least=1, unit="inputs")
    max_input_tokens: int = option(128, "tasks whose inputs have more words are left out",
                                   least=1)


class Explanations(Instructions):
    """The correlation of the two margins."""

    TITLE = "Explanations are internalised where they help (hypothesis 2, Figure 5)"
    DIFFERS = differs.EXPLANATIONS
    Settings = ExplanationSettings
    SCALES = {"pocket": {}, "paper": {**PAPER_SCALE, "tasks": 10},
              "smollm2": {**SMOLLM2, "tasks": 10, "practice_inputs": 128, "epochs": 2.0}}
    QUICK = dict(tasks=5, practice_inputs=256, test_instances=50)
    PAPER = {}

    @cached_property
    def chosen(self) -> list[NITask]:
        """So many tasks, spread over all kinds of them."""
        n = self.settings.tasks
        return [self.tasks[int(i * (len(self.tasks) / n))] for i in range(n)]

    stages = Instructions.task_stages  # no choice by margins
    rows = ["after"]

    def context(self, task: NITask, row: str = "after") -> Context:
        return Context(self.pool(task), with_explanations(task), without_explanations(task), identity)

    distils = Instructions.distils

    def figures(self) -> dict[str, Any]:
        scores = {task.name: self.folder.get(f"score-{task.name}") for task in self.chosen}
        points = {task: [s["teacher"] - s["before"], s["after"] - s["before"]] for task, s in scores.items()}
        return {"metrics": {"correlation": correlation(points.values())[0]}, "points": points}

    @classmethod
    def complete(cls, record: Record) -> Record:
        """Adds the correlation of the mean margins over the seeds, also without the largest in the prompt."""
        r, p = correlation(record["points"].values())
        others = sorted(record["points"].values(), key=lambda margins: abs(margins[0]))[:-1]
        prompt, distilled = map(sum, zip(*record["points"].values()))
        kept = round(distilled / (prompt or 1), 3)
        return record | {"mean_margins": {"correlation": round(r, 3), "p_value": p, "share_kept": kept,
                                          "without_largest": round(correlation(others)[0], 3)}}

    @classmethod
    def plot(cls, record: Record, path: Path) -> bool:
        title = f"{seeds_of(record)}: r = {record['mean_margins']['correlation']:.2f}"
        return scatter(record["points"], path, title,
                       "in-context margin (Rouge-L)", "distillation margin (Rouge-L)")

    @classmethod
    def table(cls, record: Record) -> str:
        mean, each = record["mean_margins"], pm(record["metrics"]["correlation"], 2)
        rows = [[task, f"{x:.1f}", f"{y:.1f}"] for task, (x, y) in record["points"].items()]
        return (f"Correlation of in-context and distillation margin over {len(rows)} tasks, "
                f"{seeds_of(record)}, margins averaged over the seeds: r = {mean['correlation']:.2f}, "
                f"p ≤ {mean['p_value']:.5f} (one-sided, by permutation), without the largest margin r = "
                f"{mean['without_largest']:.2f}; each seed by itself: r = {each}\n\n"
                + table(["task", "in-context margin", "distillation margin"], rows))

    @classmethod
    def front(cls, records: list[Record]) -> str:
        """README has a line of it."""
        return ""

    @classmethod
    def headline(cls, record: Record) -> str:
        r, less = (record["mean_margins"][name] for name in ("correlation", "without_largest"))
        one = f", without the largest {less:.2f}" if r - less > 0.05 else ""  # one task makes much of it
        return f"margins in prompt and student, {len(record['points'])} tasks: r = {r:.2f}{one}"
