"""What the experiments on databases share: settings, and stages on SPIDER's files (hypotheses 4 and 5)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Iterator

import numpy as np
from torch import nn

from ...distill import Template
from ...labels import Examples
from ..run import Stage
from ..settings import option
from . import sql_eval
from .instruction_tasks import TaskExperiment, TaskSettings
from .spider import Question
from .sql_eval import DATA, LONGEST, SHOTS, SPIDER_FILES, QueriedDatabase, SqlEval, load_databases, one_line


@dataclass
class SqlTaskSettings(TaskSettings):
    """Settings of an experiment on databases. The defaults are the pocket scale."""

    model: str = option("data/pocket-sql", "folder or hub id of a decoder that learns from its prompt")
    data: str = option(DATA, SPIDER_FILES)
    databases: int = option(12, "the first ones with enough questions", least=1, unit="databases")
    practice_inputs: int = option(300, "for each student", least=1, unit="questions")
    epochs: float = option(6.0, "passes over the practice set", least=1e-3, most=1e6)
    max_new_tokens: int = option(LONGEST, "longest query", least=1, most=4096, unit="tokens")
    test_instances: int = option(100, "of each database, at most", least=1, most=10_000,
                                 unit="questions")
    tuning_items: int = option(0, "of other databases, with 0 to 8 examples in the prompt, to tune the model "
                               "on first; 0: it stays as it is", least=0, unit="questions")
    tuning_epochs: float = option(2.0, "passes over these", least=1e-3, most=1e6)


TUNED_AT_ONCE = 2  # at most, rows in memory together while tuning: they are long, and share no schema
SPIDER = dict(scale="spider", model="data/smollm2", data="data/spider", plain=True, databases=8,
              practice_inputs=120, chunk=60, epochs=3.0, lr=1e-4, batch_size=16, max_new_tokens=64,
              micro_batch=16, test_instances=25, tuning_items=1000, save_every=300.0)


class SqlExperiment(TaskExperiment):
    """Stages on the databases of a folder."""

    Eval, RECORDS = SqlEval, ("pocket", "spider")
    ask, examine = staticmethod(sql_eval.ask), staticmethod(sql_eval.examine)

    @cached_property
    def databases(self) -> tuple[list[QueriedDatabase], list[QueriedDatabase]]:
        """Those of the experiment, and the others. Raises ValueError where there are too few."""
        found, wanted = load_databases(self.data), self.settings.databases
        tested = [database for database in found if database.is_large][:wanted]
        if len(tested) < wanted:
            raise ValueError(f"{wanted} databases are asked for, but {self.settings.data} has only "
                             f"{len(tested)} with enough questions")
        names = {database.name for database in tested}
        return tested, [database for database in found if database.name not in names]

    @property
    def tested(self) -> list[QueriedDatabase]:
        return self.databases[0]

    def files(self) -> list[Path]:
        paths = [self.data / name for name in ("tables.json", "dev.json", "rows.json")]
        return [path for path in paths if path.exists()]

    @cached_property
    def tuned(self) -> nn.Module:
        return self.folder.get("tuned")

    @property
    def base(self) -> nn.Module:
        return self.tuned if self.settings.tuning_items else self.loaded[0]

    def stages(self) -> Iterator[Stage]:
        if self.settings.tuning_items:
            yield Stage("tuned", self.tune)
            if not self.folder.file("tuned"):
                return
        yield from self.own_stages()

    def own_stages(self) -> Iterator[Stage]:
        raise NotImplementedError

    def tune(self) -> nn.Module:
        """The model, tuned on other databases: a question after none to eight others with their queries."""
        rng, others = np.random.default_rng((self.seed, 3)), self.tuned_on()
        if not others:
            raise ValueError(f"{self.settings.data} has no other databases to tune the model on: --databases "
                             "has to be smaller")
        prompts, answers = [], []
        for _ in range(self.settings.tuning_items):
            database = others[rng.integers(len(others))]
            order = rng.permutation(len(database.questions))[: rng.integers(1, max(SHOTS) + 2)]
            *shown, last = [database.questions[i] for i in order]
            prompts.append(database.prompt(shown)(last.question))
            answers.append(self.answer(last))
        examples = Examples.hard(self.tokenizer.encode_all(prompts), self.tokenizer.encode_answers(answers))
        rows = min(self.settings.micro_batch or TUNED_AT_ONCE, TUNED_AT_ONCE)
        settings = self.settings.fit_settings(loss="hard", micro_batch=rows)
        return self.fit_copy(self.loaded[0], examples, settings, self.settings.tuning_epochs, "tuned")

    def tuned_on(self) -> list[QueriedDatabase]:
        return self.databases[1]

    def answer(self, question: Question) -> str:
        """As in the prompt. A plain model's tokens begin with a space, and the line ends with a semicolon."""
        query = one_line(question.query)
        return f" {query} ;" if self.settings.plain else query

    def drawn(self, database: QueriedDatabase) -> tuple[list[Question], list[str]]:
        """The seed's examples and its pool of other questions."""
        return database.draw(self.seed)

    def score(self, model: nn.Module, database: QueriedDatabase, template: Template,
              name: str = "") -> dict[str, float]:
        return sql_eval.score(model, self.tokenizer, database, template, self.settings, name)

    def drop_copies(self, database: QueriedDatabase) -> None:
        """Of finished students, which stay in folders of their own."""
        for copy in (self.folder.path / database.name).rglob("round-*/student.safetensors"):
            copy.unlink()
