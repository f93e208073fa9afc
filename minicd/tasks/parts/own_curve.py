"""KL(teacher ‖ student) on validation inputs while own.py trains: a curve, and the best step's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...distill import Context
from ...runtime.files import all_tensors, atomic_safetensors, open_safetensors, read_checked, write_checked
from ...sampling import score
from ...tokenizer import TextTokenizer
from ..report import picture
from .forgetting import AT_ONCE, compare
from .own_measures import teacher_answers, teacher_logits

ADVICE = "delete it, and the file progress.safetensors beside it, to train this round anew"
Points = list[dict[str, Any]]  # step, and kl by context


class Validation:
    """model → KL(teacher ‖ model) a token along the teacher's answers, in 1/1000 nat, by context.

    The teacher answers once, and its logits stay in memory: of as many inputs as half a gigabyte can hold.
    """

    def __init__(self, base: nn.Module, tokenizer: TextTokenizer,
                 contexts: dict[str, tuple[Context, list[str]]], settings: Any):
        self.rows, self.precision = {}, settings.precision
        most = max(1, AT_ONCE // (base.config.vocab_size * settings.max_new_tokens * len(contexts)))
        for name, (context, texts) in contexts.items():
            texts = texts[:most]
            answers = teacher_answers(base, tokenizer, context, texts, settings) if texts else []
            rows = [(x, answer) for x, answer in zip(texts, answers) if answer]
            if rows:
                self.rows[name] = (tokenizer.encode_all([context.student(x) for x, _ in rows]),
                                   [answer.completion[answer.kept] for _, answer in rows],
                                   teacher_logits(base, tokenizer, context, rows, settings))

    def __call__(self, model: nn.Module) -> dict[str, float]:
        found = {}
        for name, (prompts, tokens, logits) in self.rows.items():
            divergence, _ = compare(lambda some: logits[some], lambda some: score(
                model, prompts[some], tokens[some], precision=self.precision), tokens, model)
            found[name] = 1000 * sum(divergence) / sum(map(len, tokens))
        return found


class Curve:
    """What `rounds` calls between steps; with `best`, each round ends with the weights of its best step.

    Points and weights are in the folder of the round. Those of steps that an interrupted run had done after
    its last checkpoint are made again.
    """

    def __init__(self, validation: Validation, folder: Path, schedule: list[list[str]], every: int,
                 best: bool):
        self.validation, self.folder, self.schedule = validation, folder, schedule
        self.every, self.best = every, best

    def __call__(self, student: nn.Module, number: int, step: int, steps: int) -> None:
        points = [point for point in self.points(number) if point["step"] < step]
        if step < steps and step - (points[-1]["step"] if points else 0) < self.every:
            return
        found = self.validation(student)
        file = self.folder / f"round-{number}" / "best.safetensors"
        if self.best:
            kl = float(np.mean([found[name] for name in self.schedule[number] if name in found]))
            keep_best(student, file, kl, step)
        write_checked(self.file(number), {"points": [*points, {"step": step, "kl": found}]})
        if self.best and step == steps:
            restore(student, file)

    def file(self, number: int) -> Path:
        return self.folder / f"round-{number}" / "curve.json"

    def points(self, number: int) -> Points:
        """Those of a round so far. Raises ValueError where the file is damaged."""
        file = self.file(number)
        return read_checked(file, {}, ADVICE, has="points")["points"] if file.exists() else []

    def lines(self, start: dict[str, float]) -> dict[str, list[list[float]]]:
        """Context → [step, KL], with steps counted through all rounds; `start` is the KL before the first."""
        lines, before = {name: [[0, kl]] for name, kl in start.items()}, 0
        for number in range(len(self.schedule)):
            points = self.points(number)
            for point in points:
                for name, kl in point["kl"].items():
                    lines[name].append([before + point["step"], kl])
            before += points[-1]["step"] if points else 0
        return lines


def keep_best(student: nn.Module, file: Path, kl: float, step: int) -> None:
    """Write the weights that learn, unless the file has some with a KL as small."""
    if file.exists():
        with open_safetensors(file, advice=ADVICE) as known:
            if not kl < float(known.metadata()["kl"]):
                return
    atomic_safetensors(file, learning(student), {"kl": repr(kl), "step": str(step)})


@torch.no_grad()
def restore(student: nn.Module, file: Path) -> None:
    """Raises ValueError where the file is damaged."""
    with open_safetensors(file, advice=ADVICE) as known:
        parameters = learning(student)
        for name, tensor in all_tensors(known).items():
            parameters[name].copy_(tensor)


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    """With adapters these alone, which are small."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def plot(lines: dict[str, list[list[float]]], path: Path, title: str) -> bool:
    """A PNG. Whether it was drawn."""
    def draw(axes: Any) -> None:
        for name, points in lines.items():
            axes.plot(*zip(*points), marker=".", label=name)
        axes.set(xlabel="step", ylabel="KL(teacher ‖ student) a token, 1/1000 nat", ylim=(0, None))
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend()
    return bool(lines) and picture(path, (6, 4), draw)
