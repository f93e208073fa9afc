"""README's Python example as an experiment of one file: seeds, run folder, resume, record and table are the frame's.

    python train.py knows it once it stands in minicd/tasks/__init__.py; tests/test_one_file_experiment.py runs it as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterator

import numpy as np
from torch import nn

from minicd.distill import Context, identity, practice
from minicd.labels import Examples
from minicd.metrics import exact_match
from minicd.tasks.item import one_item
from minicd.tasks.report import Record, against_paper, seeds_of
from minicd.tasks.run import Experiment, Stage
from minicd.tasks.settings import DistillSettings, option


@dataclass
class ReverseSettings(DistillSettings):
    """One seed of the experiment."""

    items: int = option(2000, "practice inputs", least=1)
    epochs: float = option(3.0, "passes over the practice set", above=0)
    lr: float = option(2e-3, "learning rate", above=0, most=10)
    batch_size: int = option(32, "batch size", least=1)
    tests: int = option(100, "lists to test", least=1)


def letters(n: int, rng: np.random.Generator) -> list[str]:
    return [" ".join(rng.choice(list("abcdefgh"), size=4)) for _ in range(n)]


class Reverse(Experiment):
    """Reverse a list untold."""

    TITLE = "Lists are reversed without being told to"
    Settings = ReverseSettings
    context = Context(letters, lambda x: f"reverse : {x}", lambda x: f"task : {x}", identity)

    def stages(self) -> Iterator[Stage]:
        settings = self.settings.practice_settings(6)
        yield Stage("example", lambda: one_item(self.context, self.tokenizer, self.base, settings, self.seed), show=str)
        yield Stage("practice", lambda: practice(self.base, self.tokenizer, self.context, self.settings.items, settings,
                                                 seed=self.seed))
        yield Stage("student", self.student, ("practice",))
        yield Stage("scores", self.scores, ("student",))

    def student(self) -> nn.Module:
        items: Examples = self.folder.get("practice")
        return self.fit_copy(self.base, items, self.settings.fit_settings(), self.settings.epochs, "student")

    def scores(self) -> dict[str, float]:
        """Percent of unseen lists that come out reversed."""
        lists = letters(self.settings.tests, np.random.default_rng(99))
        models = {"teacher": (self.base, self.context.teacher), "before": (self.base, self.context.student),
                  "after": (self.folder.get("student"), self.context.student)}
        return {row: self.percent(model, [template(x) for x in lists], lists) for row, (model, template) in models.items()}

    def percent(self, model: nn.Module, prompts: list[str], lists: list[str]) -> float:
        answers = self.generate(model, prompts, 6, temperature=0)
        return 100 * float(np.mean([exact_match(self.tokenizer.decode(answer), " ".join(reversed(x.split())))
                                    for answer, x in zip(answers, lists)]))

    def figures(self) -> dict[str, Any]:
        return {"metrics": self.folder.get("scores")}

    @classmethod
    def table(cls, record: Record) -> str:
        return f"Lists reversed, %, {seeds_of(record)}\n\n" + against_paper(record, {name: name for name in record["metrics"]})
