"""Table 3 as curves: accuracy over the number of questions that are labelled, practised, or truly answered.

The table has one point of each curve. Along a curve the number of optimiser steps stays that of the table, so
that more questions do not mean more training. `direct` is the yardstick: training on N true answers without a
scratchpad, which the student, whose teacher had 499 scratchpads, has to be measured by.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Iterator

import numpy as np
from torch import nn

from ..hf.checkpoint import load
from ..labels import Examples, Ragged
from .addition import Addition, AdditionSettings, scratchpad_examples
from .parts import differs
from .parts.addition_eval import evaluate
from .parts.addition_questions import draw_questions, test_questions
from .report import Record, line_plot, pm, seeds_of, table
from .run import Stage
from .settings import beside, option

LINES = {"teacher": "teacher on N scratchpads", "other_base": "the same from the other base",
         "student": "**student after N practice questions**", "hard": "the same on hard labels",
         "direct_teacher": "N true answers, from the teacher", "direct_base": "N true answers, from the base"}
SHORT = {"teacher": "teacher", "other_base": "from another base", "student": "student",
         "hard": "on hard labels", "direct_teacher": "on true answers", "direct_base": "from the base"}
STEP_BY_STEP, PRACTISED = ("teacher", "other_base"), ("student", "hard")
AT_ONCE = (*PRACTISED, "direct_teacher", "direct_base")


@dataclass
class CurveSettings(AdditionSettings):
    """One seed of the curves. What they share with Table 3 is taken from its run with --reuse."""

    until: str = option("practice", "what the curves start from", free=True, choices=("practice",))
    labelled: list[int] = option(lambda: [250, 499, 1000, 2000, 5000], "scratchpads, along the "
                                 "teachers' curve", least=1, most=10**6, free=True)
    budgets: list[int] = option(lambda: [499, 2000, 5000, 20_000, 60_000], "questions, along the "
                                "other curves", least=1, most=10**8, free=True)
    other_base: str = option("", "a second base for the teachers' curve")
    lines: str = option("teacher,student,direct_teacher,direct_base", "the curves, between commas, of "
                        + ", ".join(LINES), free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [line for line in self.lines.split(",") if line not in LINES]
        if unknown:
            raise ValueError(f"--lines {unknown[0]}: choose from {', '.join(LINES)}")
        if "other_base" in self.lines.split(",") and not self.other_base:
            raise ValueError("--lines other_base needs that base: --other-base FOLDER")


class Curves(Addition):
    """Accuracy over the number of questions."""

    TITLE = "How many questions addition takes"
    DIFFERS = differs.CURVES
    Settings = CurveSettings
    RECORDS = ("pocket", "smollm2")
    SCALES = Addition.SCALES | {"smollm2": Addition.SCALES["smollm2"] | dict(
        lines="student,hard", budgets=[1000, 3000, 10_000])}
    QUICK = Addition.QUICK | dict(labelled=[250, 499], budgets=[499, 10_000])

    def prepare(self) -> None:
        s = self.settings
        if max(s.budgets) > s.practice_questions:
            raise ValueError(f"--budgets {max(s.budgets)}: there are only {s.practice_questions} "
                             "--practice-questions")
        super().prepare()

    def stages(self) -> Iterator[Stage]:
        yield from super().stages()
        for line in self.lines:
            for n in self.numbers(line):
                needs = () if line in STEP_BY_STEP else ("practice",)
                yield Stage(f"{line}-{n}", partial(self.point, line, n), needs,
                            lambda score, line=line, n=n: f"{line}, {n}: {score['accuracy']:.1f} %")

    @property
    def lines(self) -> list[str]:
        extra = ["other_base"] if self.settings.other_base else []
        return list(dict.fromkeys([*self.settings.lines.split(","), *extra]))

    def numbers(self, line: str) -> list[int]:
        return self.settings.labelled if line in STEP_BY_STEP else self.settings.budgets

    def point(self, line: str, n: int) -> dict[str, Any]:
        """A model of its own for each point, and its score on the questions of the table."""
        s = self.settings
        model = self.teacher(line, n) if line in STEP_BY_STEP else self.direct(line, n)
        longest = self.longest if line in STEP_BY_STEP else 2 * s.max_digits + 4
        return evaluate(model, self.tokenizer, test_questions(s.test_questions, s.max_digits),
                        line in STEP_BY_STEP, longest, f"test {line}-{n}", s.precision, s.scratchpad)

    def teacher(self, line: str, n: int) -> nn.Module:
        s, rng = self.settings, np.random.default_rng(self.seed)
        questions = draw_questions(n, s.max_digits, "train", rng)
        base = load(beside(s.other_base), self.device)[0] if line == "other_base" else self.base
        settings = s.fit_settings(lr=s.teacher_lr, batch_size=s.teacher_batch, loss="hard")
        steps = s.teacher_epochs * per_epoch(s.train_questions, s.teacher_batch)
        return self.fit_copy(base, scratchpad_examples(questions, self.tokenizer, s.scratchpad), settings,
                             steps / per_epoch(n, s.teacher_batch), f"{line}-{n}")

    def direct(self, line: str, n: int) -> nn.Module:
        """On the first n items of practice: with the teacher's labels, soft or hard, or with true answers."""
        s, items = self.settings, self.folder.get("practice")
        start = self.base if line == "direct_base" else self.folder.get("teacher")
        chosen = first(items, max(1, round(n * len(items) / s.practice_questions)))  # some had no answer
        steps = s.student_epochs * per_epoch(len(items), s.student_batch)
        epochs = steps / per_epoch(len(chosen), s.student_batch)
        loss = s.loss if line == "student" else "hard"
        settings = s.fit_settings(lr=s.student_lr, batch_size=s.student_batch, loss=loss, dropout=0.0)
        examples = chosen if line in PRACTISED else self.true_answers(chosen)
        return self.fit_copy(start, examples, settings, epochs, f"{line}-{n}")

    def figures(self) -> dict[str, Any]:
        return {"metrics": {f"{line}-{n}": self.folder.get(f"{line}-{n}")["accuracy"]
                            for line in self.lines for n in self.numbers(line)},
                "teacher": self.folder.get("teacher_validation")["accuracy"]}

    @classmethod
    def table(cls, record: Record) -> str:
        parts = []
        for lines in (STEP_BY_STEP, AT_ONCE):
            found = {line: points for line, points in curves(record).items() if line in lines}
            numbers = sorted({n for points in found.values() for n in points})
            rows = [[LINES[line], *(pm(points[n]) if n in points else "" for n in numbers)]
                    for line, points in found.items()]
            parts += [table(["N", *(f"{n:,}" for n in numbers)], rows)] if rows else []
        return "\n\n".join([
            f"Exact match on unseen additions, %, {seeds_of(record)}. The teacher of all practice solves "
            f"{record['teacher']:.1f} % of 500 others, step by step.", *parts])

    @classmethod
    def plot(cls, record: Record, path: Path) -> bool:
        lines = {LINES[line].strip("*"): points for line, points in curves(record).items()}
        return line_plot(lines, path, cls.TITLE, "questions N", "exact match, %")

    @classmethod
    def front(cls, records: list[Record]) -> str:
        """README has a line of it."""
        return ""

    @classmethod
    def headline(cls, record: Record) -> str:
        parts, found = [], curves(record)
        for things, lines in (("scratchpads", STEP_BY_STEP), ("questions", AT_ONCE)):
            some = {line: found[line] for line in lines if line in found}
            if some:
                numbers = next(iter(some.values()))  # all of them have the same
                few, many = min(numbers), max(numbers)
                shown = (f"{SHORT[line]} {points[few]['mean']:.1f} → {points[many]['mean']:.1f}"
                         for line, points in some.items())
                parts.append(f"{few:,} → {many:,} {things}: {', '.join(shown)}")
        return "; ".join(parts) + " %"


def curves(record: Record) -> dict[str, dict[int, Any]]:
    """Curve → number of questions → metric."""
    found: dict[str, dict[int, Any]] = {}
    for name, metric in record["metrics"].items():
        line, n = name.rsplit("-", 1)
        found.setdefault(line, {})[int(n)] = metric
    return {line: found[line] for line in LINES if line in found}


def per_epoch(items: int, batch_size: int) -> int:
    """Steps of a pass, as in `Epochs`: an incomplete batch is dropped."""
    return items // min(items, batch_size)


def first(items: Examples, n: int) -> Examples:
    """The first n items."""
    def rows(ragged: Ragged) -> Ragged:
        return Ragged(ragged.values[: ragged.starts[n]], ragged.starts[: n + 1])
    answers = rows(items.answers)
    labels = items.labels.split([len(answers.values)])[0]
    inputs = None if items.inputs is None else rows(items.inputs)
    return Examples(rows(items.prompts), answers, labels, inputs)
