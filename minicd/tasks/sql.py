"""Distilling examples beats gradient descent on them (hypothesis 4; paper, section 3.2): questions to SQL.

Each database has a student of its own. T_t is its schema, 4 or 8 questions with their queries, and a
question; T_s has no examples; f is the identity; D is a pool of the database's unlabelled questions, or the
model itself, which continues the questions of the examples. The baseline is gradient descent on the same
examples, all in one batch. The measure is SPIDER's exact set match and, where rows are known, whether the
results are equal.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Iterator

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..distill import Context, combine_seeds, identity
from ..labels import Examples
from ..metrics.significance import bootstrap_interval
from ..runtime.lean import checkpointed_blocks
from ..runtime.lora import adapters
from ..training import Run
from .parts import differs
from .parts.inputs import Inputs, NearCopies, few_shot_inputs, pool
from .parts.spider import Question
from .parts.sql_eval import SHOTS, QueriedDatabase
from .parts.sql_tasks import SPIDER, SqlExperiment, SqlTaskSettings
from .report import Record, pm, seeds_of, table
from .run import Stage
from .settings import option

ROWS = {"teacher": "teacher, examples in the prompt", "before": "student before",
        "after": "**student after**, inputs from a pool", "written": "**student after**, inputs by the model",
        "best": "gradient descent on the examples, best epoch",
        "last": "gradient descent on the examples, last epoch"}
STUDENTS = {"pool": ["after"], "model": ["written"], "both": ["after", "written"]}  # --inputs → rows
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of --descent-lr, from which the best is chosen
RATED = 4  # databases on which it is chosen, at most


@dataclass
class SqlSettings(SqlTaskSettings):
    """One seed of the experiment."""

    inputs: str = option("both", "what the student practises on: a pool of questions, questions that the "
                         "model writes, or both, a student for each", choices=STUDENTS)
    max_input_tokens: int = option(24, "longest question that it may write", least=1, unit="tokens")
    input_temperature: float = option(1.0, "at which it writes them", above=0, most=10)
    descent_epochs: int = option(25, "of gradient descent on the examples", least=1, most=10_000)
    descent_lr: float = option(1e-3, "of gradient descent: the best of a tenth of it to ten times it, on "
                               "other databases", above=0, most=1)
    look_every: int = option(1, "between looks for the best one", least=1, unit="epochs")


class Sql(SqlExperiment):
    """Exact set match with 4 and 8 examples."""

    TITLE = "Examples are internalised: questions to SQL (hypothesis 4)"
    DIFFERS = differs.SQL
    Settings = SqlSettings
    SCALES = {"pocket": {}, "spider": {**SPIDER, "inputs": "pool", "descent_lr": 1e-4, "look_every": 5}}
    QUICK = dict(databases=2, practice_inputs=96, epochs=3.0, test_instances=25, look_every=9)
    PAPER = {"teacher_4": 27.7, "teacher_8": 28.2, "before_4": 0.3, "before_8": 0.3, "after_4": 22.1,
             "after_8": 27.9, "best_4": 13.4, "best_8": 18.9}

    @property
    def students(self) -> list[str]:
        return STUDENTS[self.settings.inputs]

    def own_stages(self) -> Iterator[Stage]:
        yield self.example(lambda: self.context(self.tested[0], SHOTS[0], self.students[0]))
        for n in SHOTS:
            yield Stage(f"rates-{n}", partial(self.rates, n), show=lambda rates, n=n: (
                f"gradient descent on {n} examples: learning rate {rates['best']:g} for the best epoch, "
                f"{rates['last']:g} for the last"))
        for database in self.tested:
            students = {(row, n): f"{database.name}/student_{row}-{n}"
                        for row in self.students for n in SHOTS}
            for (row, n), name in students.items():
                yield Stage(name, partial(self.student, database, n, row))
            for n in SHOTS:
                yield Stage(f"descent-{database.name}-{n}", partial(self.descents, database, n),
                            (f"rates-{n}",))
            yield Stage(f"score-{database.name}", partial(self.scores, database), tuple(students.values()),
                        lambda s, name=database.name: f"{name}: " + ", ".join(
                            f"{row} {s[row]['match']:.0f}" for row in s))

    # --- distilling ---

    def context(self, database: QueriedDatabase, n: int, row: str) -> Context:
        examples, questions = self.drawn(database)
        inputs = pool(questions) if row == "after" else self.written(database, examples[:n])
        return Context(inputs, database.prompt(examples[:n]), database.prompt(), identity)

    def written(self, database: QueriedDatabase, examples: list[Question]) -> Inputs:
        """By the model, after the questions of the examples. None is a test question."""
        s, tests = self.settings, NearCopies(test.question for test in database.tests)
        return few_shot_inputs(self.base, self.tokenizer, [e.question for e in examples], len(examples),
                               s.max_input_tokens, tests, s.precision, s.input_temperature)

    def student(self, database: QueriedDatabase, n: int, row: str) -> nn.Module:
        seed = combine_seeds((self.seed, 10 * self.tested.index(database) + n))
        return self.distill_rounds(f"{database.name}/{row}-{n}", [[self.context(database, n, row)]], seed)

    def scores(self, database: QueriedDatabase) -> dict[str, dict[str, float]]:
        """Row → its measures."""
        (examples, _), bare = self.drawn(database), database.prompt()
        found = {"before": self.score(self.base, database, bare, f"before on {database.name}")}
        for n in SHOTS:
            found[f"teacher_{n}"] = self.score(self.base, database, database.prompt(examples[:n]),
                                              f"teacher on {database.name}")
            for row in self.students:
                student = self.folder.get(f"{database.name}/student_{row}-{n}")
                found[f"{row}_{n}"] = self.score(student, database, bare, f"student on {database.name}")
        self.drop_copies(database)
        return found

    # --- gradient descent on the examples ---

    @property
    def rated(self) -> list[QueriedDatabase]:
        """The other databases on which learning rates are chosen."""
        return [database for database in self.databases[1] if database.is_large][:RATED]

    def tuned_on(self) -> list[QueriedDatabase]:
        """None of those: where the model has learnt the answers, the smallest rate looks best."""
        rated = {database.name for database in self.rated}
        return [database for database in self.databases[1] if database.name not in rated]

    def rates(self, n: int) -> dict[str, float]:
        """The learning rates that are best for the best and for the last epoch, on other databases."""
        others = self.rated
        if not others:
            raise ValueError(f"{self.settings.data} has no other databases with enough questions to choose "
                             "the learning rate of gradient descent on: --databases has to be smaller")
        matches = {rate: np.mean([[looks["best"]["match"], looks["last"]["match"]] for database in others
                                  for looks in [self.descend(database, n, rate)]], axis=0)
                   for rate in (factor * self.settings.descent_lr for factor in FACTORS)}
        return {epoch: max(matches, key=lambda rate: matches[rate][i])
                for i, epoch in enumerate(("best", "last"))}

    def descents(self, database: QueriedDatabase, n: int) -> dict[str, dict[str, float]]:
        """The best and the last epoch, each with its own learning rate."""
        rates = self.folder.get(f"rates-{n}")
        looks = {rate: self.descend(database, n, rate) for rate in set(rates.values())}
        return {f"{epoch}_{n}": looks[rate][epoch] for epoch, rate in rates.items()}

    def descend(self, database: QueriedDatabase, n: int, lr: float) -> dict[str, dict[str, float]]:
        """Scores of the best and of the last epoch. All examples are one batch, the rate is constant.

        The best one is chosen on the test questions, as in the paper, and for each database by itself: an
        advantage for the baseline.
        """
        s, model, examples = self.settings, deepcopy(self.base), self.drawn(database)[0][:n]
        prompts = self.tokenizer.encode_all([database.prompt()(example.question) for example in examples])
        answers = self.tokenizer.encode_answers([self.answer(example) for example in examples])
        batch = Examples.hard(prompts, answers).batch(torch.arange(n), model.config.pad_token_id)
        how, looks = s.fit_settings(lr=lr, loss="hard", warmup=0.0, decay=0.0), []
        with adapters(model, s.lora_rank, self.seed), checkpointed_blocks(model, s.checkpointing):
            run = Run(model.train(), how, s.descent_epochs, self.seed, None)
            for epoch in tqdm(range(1, s.descent_epochs + 1), f"{database.name}, lr {lr:g}", leave=False):
                run.update(*batch)
                if epoch % s.look_every == 0 or epoch == s.descent_epochs:
                    looks.append(self.score(model, database, database.prompt()))
        return {"best": max(looks, key=lambda look: look["match"]), "last": looks[-1]}

    # --- the record ---

    def figures(self) -> dict[str, Any]:
        """Means over the databases; each database's by seed, for the interval of `complete`."""
        by_database = {}
        for database in self.tested:
            found = dict(self.folder.get(f"score-{database.name}"))
            found["before_4"] = found["before_8"] = found.pop("before")
            for n in SHOTS:
                found |= self.folder.get(f"descent-{database.name}-{n}")
            by_database[database.name] = {row: found[row] for row in sorted(found)}
        first = next(iter(by_database.values()))
        metrics = {row + ("" if measure == "match" else f"_{measure}"):
                   float(np.mean([rows[row][measure] for rows in by_database.values()]))
                   for measure in first["before_4"] for row in first}
        match = {name: {row: found["match"] for row, found in rows.items()}
                 for name, rows in by_database.items()}
        return {"metrics": metrics, "by_database": match, "by_seed": {str(self.seed): match},
                "rates_in_1e-5": {str(n): {epoch: 1e5 * rate for epoch, rate
                                           in self.folder.get(f"rates-{n}").items()} for n in SHOTS}}

    @classmethod
    def complete(cls, record: Record) -> Record:
        """By how many points a student leads gradient descent's best epoch, over databases and seeds."""
        seeds, leads = list(record["by_seed"].values()), {}
        for row in [row for row in record["metrics"] if row.split("_")[0] in ("after", "written")]:
            if row.endswith("execution"):
                continue
            best = f"best_{row.split('_')[1]}"
            points = [[seed[name][row] - seed[name][best] for seed in seeds] for name in seeds[0]]
            numbers = (np.mean(points), *bootstrap_interval(points))
            leads[row] = {name: round(float(x), 2) for name, x in zip(("mean", "low", "high"), numbers)}
        return record | {"leads": leads}

    @classmethod
    def table(cls, record: Record) -> str:
        """Beside the paper's figures, then results on the rows, then database by database."""
        metrics, paper, by_database = record["metrics"], record["paper"], record["by_database"]
        def rows(suffix: str, *more: Any) -> list[list[Any]]:
            return [[title, *(pm(metrics[f"{row}_{n}{suffix}"]) for n in SHOTS), *(f(row) for f in more)]
                    for row, title in ROWS.items() if f"{row}_4" in metrics]
        head = ["", *(f"{n} examples" for n in SHOTS)]
        of_paper = [lambda row, n=n: paper.get(f"{row}_{n}", "") for n in SHOTS]
        parts = [f"SPIDER's exact set match, mean of {len(by_database)} databases, %, {seeds_of(record)}",
                 table([*head, *(f"paper, {n}" for n in SHOTS)], rows("", *of_paper)), leads_line(record)]
        if "teacher_4_execution" in metrics:
            parts += ["Queries with the right result, %", table(head, rows("_execution"))]
        names = [row for row in ROWS if f"{row}_4" in metrics]
        each = [[name, *(" / ".join(f"{found[f'{row}_{n}']:.0f}" for n in SHOTS) for row in names)]
                for name, found in by_database.items()]
        return "\n\n".join([*parts, table([f"match, {' / '.join(map(str, SHOTS))} examples", *names], each)])

    @classmethod
    def headline(cls, record: Record) -> str:
        metrics = record["metrics"]
        row = "after" if "after_4" in metrics else "written"
        rows = (row, "teacher", "before", "best")
        after, teacher, before, best = (pm(metrics[f"{name}_4"]) for name in rows)
        if record["scale"] == "spider":
            return f"{after} % after, {teacher} in the prompt, {before} before, {best} by gradient descent"
        return (f"exact set match {after} % after distilling 4 examples, {teacher} in the prompt, {before} "
                f"before, {best} by gradient descent (paper: 22.1, 27.7, 0.3, 13.4)")


def leads_line(record: Record) -> str:
    parts = [f"{row.split('_')[0]}, {row.split('_')[1]} examples: {lead['mean']:+.1f} points "
             f"({lead['low']:+.1f} to {lead['high']:+.1f})" for row, lead in record["leads"].items()]
    return ("Student − gradient descent's best epoch (95 % interval: bootstrap over databases and seeds; "
            f"paper, Table 2: +8.7 and +9.0): {'; '.join(parts)}")
