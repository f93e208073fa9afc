"""Explanations are internalised where they help (hypothesis 2; paper, section 3.1 and Figure 5).

T_t is a task's definition with examples and their explanations, T_s the same without explanations, f the identity, and D the
task's own inputs beyond the test instances. For each task: how much explanations help in the prompt (in-context margin),
against how much distilling them helps (distillation margin).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..distill import Context, identity
from .experiment import record, seed_folders, write_record
from .report import explanations_table, minutes_line, scatter
from .instructions import (PAPER_SCALE, TEST, InstructionRun, InstructionSettings, pool, with_explanations,
                           without_explanations)
from .natural_instructions import NITask

Settings = InstructionSettings
POCKET = dict(tasks=24, practice_inputs=512)
SCALES = {"pocket": POCKET, "paper": {**PAPER_SCALE, "tasks": 10}}
QUICK = dict(tasks=5, practice_inputs=256, test_instances=50)
SHUFFLES = 100_000


class ExplanationRun(InstructionRun):
    """One seed: for each task the two margins."""

    def context(self, task: NITask) -> Context:
        inputs = pool([instance.input for instance in task.instances[TEST:]])
        return Context(inputs, with_explanations(task), without_explanations(task), identity)

    def chosen(self) -> list[NITask]:
        """So many tasks, spread over all kinds of them."""
        if not 3 <= self.settings.tasks <= len(self.tasks):
            raise ValueError(f"--tasks {self.settings.tasks}: there are {len(self.tasks)} tasks, and a correlation needs 3")
        every = len(self.tasks) / self.settings.tasks
        return [self.tasks[int(i * every)] for i in range(self.settings.tasks)]


def correlation(points: list[tuple[float, float]], seed: int = 0) -> tuple[float, float]:
    """Pearson's r of the points and its one-sided p-value by permutation: the share of shuffled pairings with a larger r.

    0 and 1 where all margins of a kind are equal, so that nothing can correlate.
    """
    x, y = (np.array(side) - np.mean(side) for side in zip(*points))
    if not x.any() or not y.any():
        return 0.0, 1.0
    rng, scale = np.random.default_rng(seed), float(np.sqrt((x @ x) * (y @ y)))
    larger = sum(int((rng.permuted(np.tile(y, (1000, 1)), axis=1) @ x >= x @ y - 1e-12).sum()) for _ in range(SHUFFLES // 1000))
    return float(x @ y) / scale, (larger + 1) / (SHUFFLES + 1)


def margins(by_seed: list[dict[str, dict[str, float]]]) -> dict[str, tuple[float, float]]:
    """Task → in-context margin and distillation margin, mean over the seeds."""
    def mean(task: str, name: str) -> float:
        return float(np.mean([tasks[task][name] - tasks[task]["before"] for tasks in by_seed]))
    return {task: (round(mean(task, "teacher"), 2), round(mean(task, "after"), 2)) for task in by_seed[0]}


def train(settings: InstructionSettings, seeds: list[int], out: Path, device: torch.device, publish: bool = False) -> None:
    """`train.py --task explanations`: every seed's tasks, then the correlation, the plot and the record."""
    folders = seed_folders(settings, seeds, out, device)
    by_seed = [ExplanationRun(settings, seed, folder, device).run() for seed, folder in zip(seeds, folders)]
    each = [correlation(list(margins([tasks]).values()))[0] for tasks in by_seed]
    points = margins(by_seed)
    r, p = correlation(list(points.values()))
    result = record("explanations", settings.scale, seeds, settings, folders, {"correlation": each}, points=points,
                    mean_margins={"correlation": round(r, 3), "p_value": p, "shuffles": SHUFFLES})
    write_record(result, out, publish)
    print(f"\n{explanations_table(result)}\n\n{minutes_line(result)}\n{scatter(result, out, publish)}")
