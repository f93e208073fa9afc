"""Databases with questions, their prompts, and how well a model answers them (hypotheses 4 and 5)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Sequence
from zlib import crc32

import numpy as np
from torch import nn

from ...distill import Template
from ...metrics.sql import sql_exact_match
from ...metrics.sqlite import QueryError, build_database, execution_match, run_query
from ...runtime.files import read_json
from ...sampling import generate
from ...tokenizer import TextTokenizer
from ..settings import EvalSettings, beside, option
from .inputs import tell_unknown_words
from .instruction_eval import PLAIN, end_with_line
from .spider import Question, load_questions, load_schemas, schema_text

DATA = "data/databases"
WIDE = f"{DATA}/wide"  # with more jargon than four examples have
SPIDER_FILES = "folder with SPIDER's tables.json and dev.json, and rows.json if there is one"
TESTED = 3  # the first third of a database's questions is for tests, the others are for examples and practice
SHOTS = (4, 8)  # examples in the teacher's prompt
LONGEST = 40  # tokens of a query, unless settings say otherwise


@dataclass(frozen=True)
class QueriedDatabase:
    """A database with its questions. `rows`: those of each table, where they are known."""

    schema: dict[str, Any]
    questions: list[Question]
    rows: dict[str, list] | None

    @property
    def name(self) -> str:
        return self.schema["db_id"]

    @cached_property
    def cut(self) -> int:
        """How many questions are for tests. SPIDER asks most things twice in a row, which stay together."""
        cut = len(self.questions) // TESTED
        while 0 < cut < len(self.questions) and self.questions[cut].query == self.questions[cut - 1].query:
            cut += 1
        return cut

    @property
    def tests(self) -> list[Question]:
        return self.questions[: self.cut]

    @property
    def others(self) -> list[Question]:
        return self.questions[self.cut :]

    @cached_property
    def connection(self) -> Any:
        """The sqlite3 database in memory. Raises ValueError for rows that do not fit."""
        return build_database(self.schema, self.rows)

    def prompt(self, examples: Sequence[Question] = ()) -> Template:
        """T_t with these examples, T_s with none."""
        return lambda question: sql_prompt(self.schema, examples, question)

    @property
    def is_large(self) -> bool:
        """Whether there are enough questions to test, to show, and to practise on."""
        return bool(self.tests) and len(self.others) > max(SHOTS)

    def draw(self, seed: int) -> tuple[list[Question], list[str]]:
        """As many examples as the longest prompt has, and the other questions that are not for tests."""
        order = np.random.default_rng((seed, crc32(self.name.encode()))).permutation(len(self.others))
        drawn = [self.others[i] for i in order]
        return drawn[: max(SHOTS)], [question.question for question in drawn[max(SHOTS) :]]


def sql_prompt(schema: dict[str, Any], examples: Sequence[Question], question: str) -> str:
    """Schema, examples, question. An example's query ends with a semicolon and its line."""
    shown = [f"Question: {one_line(e.question)}\nSQL: {one_line(e.query)} ;" for e in examples]
    return "\n".join([schema_text(schema), *shown, f"Question: {one_line(question)}\nSQL:"])


def one_line(text: str) -> str:
    return " ".join(text.split())


def load_databases(folder: Path) -> list[QueriedDatabase]:
    """tables.json, dev.json and, where it is there, rows.json: db_id → table → rows.

    Databases without questions are left out, and so are questions that were there before. Raises ValueError,
    with file and key, where one is unusable.
    """
    schemas = load_schemas(folder / "tables.json")
    for name in schemas:
        if not re.fullmatch(r"\w[\w.+-]*", name):  # it becomes a folder's
            raise ValueError(f"{folder / 'tables.json'}: the db_id {name!r} has more than letters, digits "
                             "and _ . + -")
    asked: dict[str, dict[str, Question]] = {}
    for question in load_questions(folder / "dev.json", schemas):
        asked.setdefault(question.db_id, {}).setdefault(one_line(question.question), question)
    path = folder / "rows.json"
    rows = read_json(path) if path.exists() else {}
    if not isinstance(rows, dict) or not all(isinstance(tables, dict) for tables in rows.values()):
        raise ValueError(f"{path} does not hold the rows of each table of each database by name")
    if path.exists() and (bare := [name for name in asked if not rows.get(name)]):
        raise ValueError(f"{path} has no rows of {bare[0]}, which has questions")
    databases = [QueriedDatabase(schemas[name], list(found.values()), rows.get(name))
                 for name, found in asked.items()]
    for database in databases:
        check_rows(database, path)
    return databases


def check_rows(database: QueriedDatabase, path: Path) -> None:
    """Raises ValueError, with file and key, where rows do not fit the tables or a gold query does not run."""
    for table, rows in (database.rows or {}).items():
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise ValueError(f"{path}: {database.name}: {table} is no list of rows, which are lists, too")
    for question in database.questions if database.rows else ():
        try:
            run_query(question.query, database.connection)
        except QueryError as error:
            raise ValueError(f"{path.with_name('dev.json')}: {database.name}: SQLite refuses the query "
                             f"{question.query!r}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {database.name}: {error}") from None


def score(model: nn.Module, tokenizer: TextTokenizer, database: QueriedDatabase, template: Template,
          settings: Any, name: str = "") -> dict[str, float]:
    """Greedy answers to the test questions: percent of exact set matches and, with rows, of equal results."""
    tests = database.tests[: settings.test_instances]
    prompts = tokenizer.encode_all([template(test.question) for test in tests])
    written = generate(model, prompts, settings.max_new_tokens or LONGEST, temperature=0, progress=name,
                       precision=settings.precision)
    pairs = [(tokenizer.decode(tokens), test.query) for tokens, test in zip(written, tests)]
    found = {"match": [sql_exact_match(*pair, database.schema) for pair in pairs]}
    if database.rows:
        found["execution"] = [execution_match(*pair, database.connection) for pair in pairs]
    return {metric: 100 * float(np.mean(right)) for metric, right in found.items()}


# --- eval.py ---


@dataclass
class SqlEval(EvalSettings):
    """How eval.py examines a model on databases."""

    data: str | None = option(None, f"{SPIDER_FILES}; as in the run, or {DATA}")
    database: str = option("", "only this one, by its name (db_id); to --ask, the first unless named")
    test_instances: int = option(100, "of each database", least=1, most=10_000, unit="questions")
    max_new_tokens: int | None = option(None, f"longest query; as in the run, or {LONGEST} tokens",
                                        least=1, most=4096)
    plain: bool | None = option(None, PLAIN + "; as in the run, unless given")
    shots: int = option(0, "in the prompt of --ask", least=0, most=max(SHOTS), unit="examples")
    seed: int | None = option(None, "whose examples are shown; as in the run, or 0", least=0, most=2**32 - 1)


def chosen(settings: SqlEval) -> list[QueriedDatabase]:
    """Raises ValueError where no database has the name."""
    data = settings.data or DATA
    found = load_databases(Path(beside(data)))
    named = [database for database in found if settings.database in ("", database.name)]
    if not named:
        raise ValueError(f"--database {settings.database}: {data} has no such database; it has "
                         f"{', '.join(database.name for database in found)}")
    return named


def ask(model: nn.Module, tokenizer: TextTokenizer, question: str, settings: SqlEval) -> str:
    """`eval.py --ask QUESTION`: the query."""
    if settings.plain:
        end_with_line(model, tokenizer)
    database = chosen(settings)[0]
    prompt = database.prompt(database.draw(settings.seed or 0)[0][: settings.shots])(question)
    tell_unknown_words(tokenizer, prompt)
    return tokenizer.decode(generate(model, [tokenizer.encode(prompt)], settings.max_new_tokens or LONGEST,
                                     temperature=0, precision=settings.precision)[0])


def examine(model: nn.Module, tokenizer: TextTokenizer, settings: SqlEval, folder: Path) -> str:
    """`eval.py`: every database with 0, 4 and 8 examples in the prompt."""
    if settings.plain:
        end_with_line(model, tokenizer)
    lines = []
    for database in chosen(settings):
        examples, _ = database.draw(settings.seed or 0)
        for n in (0, *SHOTS):
            found = score(model, tokenizer, database, database.prompt(examples[:n]), settings, database.name)
            lines.append(f"{database.name}, {n} examples: "
                         + ", ".join(f"{metric} {value:.1f} %" for metric, value in found.items()))
    return "\n".join(lines)
