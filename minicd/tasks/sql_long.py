"""More examples than the prompt shows are internalised (hypothesis 5; paper, section 3.2 and B.5).

No prompt may have more than 4 of a database's 8 examples. The teacher's prompts are 8 random fours of them,
whose probabilities are averaged; the student sees the first four, too. And what the choice of round costs:
the first four and the other four in one round (simultaneous), one after the other (sequential), and one after
the other where the second teacher is the first student (recursive). Those students see no example.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Iterator

import numpy as np
from torch import nn

from ..distill import Context, Template, combine_seeds, identity
from ..metrics.significance import signed_rank
from .parts import differs
from .parts.inputs import pool
from .parts.sql_eval import SHOTS, SPIDER_FILES, WIDE, QueriedDatabase
from .parts.sql_tasks import SPIDER, SqlExperiment, SqlTaskSettings
from .report import Record, pm, seeds_of, table
from .run import Stage
from .settings import option

ROWS = {"teacher": "teacher, four examples in the prompt (mean of its prompts)",
        "all": "for comparison: all eight in one prompt", "before": "student before, sees the first four",
        "after": "**student after**, sees the first four", "before_bare": "student before, sees none",
        "simultaneous": "simultaneous, sees none", "sequential": "sequential, sees none",
        "recursive": "recursive, sees none"}
STUDENTS = ("after", "simultaneous", "sequential", "recursive")
WINDOW, MOST = SHOTS  # examples in a prompt, and of a database


@dataclass
class LongSettings(SqlTaskSettings):
    """One seed of the experiment."""

    data: str = option(WIDE, SPIDER_FILES)
    teachers: int = option(8, "of the teacher: random fours of the examples", least=2, most=70,
                           unit="prompts")


class LongSql(SqlExperiment):
    """Exact set match before and after, over databases."""

    TITLE = "More examples than the prompt shows (hypothesis 5)"
    DIFFERS = differs.SQL_LONG
    Settings = LongSettings
    SCALES = {"pocket": {}, "spider": SPIDER}
    QUICK = dict(databases=3, practice_inputs=96, epochs=3.0, test_instances=25, teachers=3)

    def own_stages(self) -> Iterator[Stage]:
        yield self.example(lambda: self.schedule(self.tested[0], "after")[0][0])
        for database in self.tested:
            students = [f"{database.name}/student_{row}" for row in STUDENTS]
            for row, name in zip(STUDENTS, students):
                yield Stage(name, partial(self.student, database, row))
            yield Stage(f"score-{database.name}", partial(self.scores, database), tuple(students),
                        lambda s, name=database.name: f"{name}: " + ", ".join(
                            f"{row} {s[row]['match']:.0f}" for row in s))

    def teachers(self, database: QueriedDatabase) -> list[Template]:
        """Prompts with random fours of the examples, each followed by the other four.

        Else one example may be in all prompts and another in none, and the average forgets the latter.
        """
        (examples, _), n = self.drawn(database), self.settings.teachers
        rng = np.random.default_rng((self.seed, 11, self.tested.index(database)))
        orders = [rng.permutation(MOST) for _ in range((n + 1) // 2)]
        fours = [sorted(half) for order in orders for half in (order[:WINDOW], order[WINDOW:])][:n]
        return [database.prompt([examples[i] for i in four]) for four in fours]

    def schedule(self, database: QueriedDatabase, row: str) -> list[list[Context]]:
        """The rounds of a row."""
        examples, questions = self.drawn(database)
        first, second = examples[:WINDOW], examples[WINDOW:]
        if row == "after":
            return [[Context(pool(questions), self.teachers(database), database.prompt(first), identity)]]
        contexts = [Context(pool(questions), database.prompt(four), database.prompt(), identity)
                    for four in (first, second)]
        return [contexts] if row == "simultaneous" else [[context] for context in contexts]

    def student(self, database: QueriedDatabase, row: str) -> nn.Module:
        seed = combine_seeds((self.seed, self.tested.index(database)))
        return self.distill_rounds(f"{database.name}/{row}", self.schedule(database, row), seed,
                                   recursive=row == "recursive")

    def scores(self, database: QueriedDatabase) -> dict[str, dict[str, float]]:
        """Row → its measures."""
        examples, _ = self.drawn(database)
        bare, four = database.prompt(), database.prompt(examples[:WINDOW])
        of_base = {"all": database.prompt(examples), "before": four, "before_bare": bare}
        found = {row: self.score(self.base, database, template, f"{row} on {database.name}")
                 for row, template in of_base.items()}
        taught = [self.score(self.base, database, template) for template in self.teachers(database)]
        found["teacher"] = {key: float(np.mean([each[key] for each in taught])) for key in taught[0]}
        for row in STUDENTS:
            student = self.folder.get(f"{database.name}/student_{row}")
            template = four if row == "after" else bare
            found[row] = self.score(student, database, template, f"{row} on {database.name}")
        self.drop_copies(database)
        return found

    def figures(self) -> dict[str, Any]:
        """Means over the databases, and each."""
        found = {database.name: self.folder.get(f"score-{database.name}") for database in self.tested}
        first = next(iter(found.values()))
        metrics = {row + ("" if measure == "match" else f"_{measure}"):
                   float(np.mean([rows[row][measure] for rows in found.values()]))
                   for measure in first["after"] for row in ROWS}
        return {"metrics": metrics, "by_database": {name: {row: rows[row]["match"] for row in ROWS}
                                                    for name, rows in found.items()}}

    @classmethod
    def complete(cls, record: Record) -> Record:
        """The test of after > before over the databases, each one's mean over the seeds."""
        gains = [rows["after"] - rows["before"] for rows in record["by_database"].values()]
        return record | {"gain": {"mean": round(float(np.mean(gains)), 2), "p_value": signed_rank(gains),
                                  "better": sum(gain > 0 for gain in gains), "databases": len(gains)}}

    @classmethod
    def table(cls, record: Record) -> str:
        metrics, gain, by_database = record["metrics"], record["gain"], record["by_database"]
        runs = "teacher_execution" in metrics
        rows = [[title, *(pm(metrics[row + kind]) for kind in ("", "_execution")[: 1 + runs])]
                for row, title in ROWS.items()]
        each = [[name, *(f"{found[row]:.0f}" for row in ROWS)] for name, found in by_database.items()]
        return "\n\n".join([
            f"Mean of {len(by_database)} databases, {seeds_of(record)}",
            table(["", "exact set match, %", *["right result, %"] * runs], rows),
            f"The student gains {gain['mean']:+.1f} points, and on {gain['better']} of {gain['databases']} "
            f"databases: p = {gain['p_value']:.4f} (signed-rank test over databases, one-sided, exact)",
            table(["match", *ROWS], each)])

    @classmethod
    def headline(cls, record: Record) -> str:
        after, before = (pm(record["metrics"][name]) for name in ("after", "before"))
        return (f"exact set match {before} % with four examples in the prompt, {after} after distilling "
                f"eight, p = {record['gain']['p_value']:.4f} over databases")
