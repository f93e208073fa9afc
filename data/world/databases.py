"""Small databases in SPIDER's shape, whose users speak a jargon of their own.

Of three tables at most, users ask about one. A jargon word names one of its columns, or a value in it, in
this database alone. A house style holds for all queries: a condition that no question mentions. So what a
question means can only be learnt from examples. A hash decides whether a database is for training the base,
for validation or for the experiment, and whether a question is for practice or for tests.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

TABLES = ("singer concert river museum airport ship school farm hotel team book film shop garden bridge "
          "train").split()
TEXTS = ("name title colour country genre brand kind shape origin season grade owner format city material "
         "style status state region sector").split()
NUMBERS = ("age price weight height length size speed score cost salary budget capacity area depth width "
           "power rooms pages votes visitors").split()
VALUES = [f"'{word}'" for word in (
    "red blue green black white gold north south east west old new live closed small large public private "
    "glass stone wood steel daily weekly").split()]
NONSENSE = [onset + nucleus + coda for onset in ("bw", "dw", "vl", "zm", "fn", "gw")
            for nucleus in "aeiou" for coda in "px"]  # the users' words
LARGEST = 30  # number in a column
ROWS = 12  # of a table
SPREAD = 4  # different values of a text column

FUNCTIONS = {"largest": "max", "smallest": "min", "average": "avg", "total": "sum"}
# Question and query: {a}, {b} any column, {n} one of numbers, {c} one of text, {v} a value in it, {k} a
# number, {f} a function, {t} the table, {h} the house style, which is the first ones' only condition.
SHAPES = [
    ("list the {a}", "select {a} from {t} where {h}"),
    ("{f} {n}", "select {f} ( {n} ) from {t} where {h}"),
    ("list the {a} and the {b}", "select {a} , {b} from {t} where {h}"),
    ("count for each {a}", "select {a} , count ( * ) from {t} where {h} group by {a}"),
    ("{f} {n} for each {c}", "select {c} , {f} ( {n} ) from {t} where {h} group by {c}"),
    ("{a} with the most {n}", "select {a} from {t} where {h} order by {n} desc limit 1"),
    ("{a} with the least {n}", "select {a} from {t} where {h} order by {n} asc limit 1"),
    ("count if {n} is over {k}", "select count ( * ) from {t} where {h} and {n} > {k}"),
    ("list the {a} if {n} is over {k}", "select {a} from {t} where {h} and {n} > {k}"),
    ("list the {a} if {n} is under {k}", "select {a} from {t} where {h} and {n} < {k}"),
    ("list the {a} if {c} is {v}", "select {a} from {t} where {h} and {c} = {v}"),
    ("count if {c} is {v}", "select count ( * ) from {t} where {h} and {c} = {v}"),
    ("{f} {n} if {c} is {v}", "select {f} ( {n} ) from {t} where {h} and {c} = {v}")]
SPLITS = {"test": 1 / 16, "validation": 2 / 16, "train": 1.0}  # of databases, up to this share
TESTED = 1 / 3  # share of the questions


@dataclass(frozen=True)
class Level:
    """How varied databases are. A base learns simple ones first."""

    tables: int = 3  # at most
    columns: int = 5  # that users ask about, at most
    names: int = 20  # of columns of each type, to draw from
    words: int = len(NONSENSE)  # of the jargon, to draw from
    shapes: int = len(SHAPES)
    fewest: int = 4  # columns that users ask about, at least, if there are as many


FULL = Level()
WIDE = Level(columns=8, fewest=8)  # four examples seldom have all of the jargon


@dataclass(frozen=True)
class Database:
    """One database. `schema` is an entry of tables.json."""

    schema: dict[str, Any]
    table: str  # that users ask about
    columns: dict[str, str]  # jargon word → column
    values: dict[str, tuple[str, str]]  # jargon word → text column, value in it
    style: tuple[str, str]  # column and value in the condition of all queries
    shapes: int  # of its questions

    @cached_property
    def split(self) -> str:
        """test, validation or train."""
        known = [self.schema["column_names_original"], self.table, self.columns, self.values, self.style]
        part = share(json.dumps(known))
        return next(split for split, most in SPLITS.items() if part < most)

    @cached_property
    def numbers(self) -> list[str]:
        """The jargon of columns of numbers."""
        return [word for word, column in self.columns.items() if column in NUMBERS]

    def question(self, rng: random.Random) -> tuple[str, str]:
        """A question and its query."""
        question, query = rng.choice(SHAPES[: self.shapes])
        slots = set(re.findall(r"{(\w)}", question))
        value = rng.choice(list(self.values))
        of_value = next(word for word, column in self.columns.items() if column == self.values[value][0])
        said = {"n": rng.choice(self.numbers), "c": of_value}
        said = {slot: word for slot, word in said.items() if slot in slots}
        others = [word for word in self.columns if word not in said.values()]
        said |= zip("ab", rng.sample(others, min(2, len(others))))
        function, number = rng.choice(list(FUNCTIONS)), str(rng.randrange(1, LARGEST))
        meant = {slot: self.columns[word] for slot, word in said.items()}
        return (question.format(**said, v=value, f=function, k=number),
                query.format(**meant, v=self.values[value][1], f=FUNCTIONS[function], k=number,
                             t=self.table, h=" = ".join(self.style)))

    def questions(self, n: int, tested: bool, rng: random.Random) -> dict[str, str]:
        """n different questions for tests, or for practice, with their queries.

        Raises ValueError where there are hardly so many.
        """
        found: dict[str, str] = {}
        for _ in range(100 * n):
            question, query = self.question(rng)
            if (share(f"{self.schema['db_id']} {question}") < TESTED) == tested:
                found[question] = query
            if len(found) == n:
                return found
        raise ValueError(f"{self.schema['db_id']} does not have {n} different questions")

    @cached_property
    def rows(self) -> dict[str, list[list[Any]]]:
        """The rows of each table: text columns have SPREAD different values."""
        rng, columns = random.Random(self.schema["db_id"]), self.schema["column_names_original"]
        known = {self.style[0]: [self.style[1]] * (SPREAD - 1)}  # the style keeps more than half of the rows
        for column, value in self.values.values():
            known.setdefault(column, []).append(value)
        return {table: make_rows([name for j, name in columns if j == i], known, rng)
                for i, table in enumerate(self.schema["table_names_original"])}


def share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(sha256(text.encode()).digest()[:8]) / 2**64


def draw_database(rng: random.Random, split: str = "train", level: Level = FULL) -> Database:
    """A random database of this split."""
    while True:
        database = any_database(rng, level)
        if database.split == split:
            return database


def any_database(rng: random.Random, level: Level) -> Database:
    """Half of the columns that are asked about hold numbers; one text column's values have jargon, too."""
    tables = rng.sample(TABLES, rng.randint(1, level.tables))
    asked = rng.randint(min(level.fewest, level.columns), level.columns)
    texts = rng.sample(TEXTS[: level.names], 1 + (asked + 1) // 2)  # one more for the house style
    numbers = rng.sample(NUMBERS[: level.names], asked // 2)
    own = [*texts, *numbers]
    content = {table: ["id", *rng.sample([*TEXTS, *NUMBERS], rng.randint(2, 4))] for table in tables}
    content[table := rng.choice(tables)] = ["id", *rng.sample(own, len(own))]
    for other in tables[1:]:
        content[other].append(f"{tables[0]}_id")
    words = rng.sample(NONSENSE[: level.words], asked + 2)
    return Database(
        schema=make_schema(tables, content), table=table, columns=dict(zip(words, [*texts[1:], *numbers])),
        values={word: (texts[1], value) for word, value in zip(words[asked:], rng.sample(VALUES, 2))},
        style=(texts[0], rng.choice(VALUES)), shapes=level.shapes)


def make_schema(tables: list[str], content: dict[str, list[str]]) -> dict[str, Any]:
    """An entry of tables.json. Tables after the first refer to it; the name is the tables' with a hash."""
    columns = [[-1, "*"], *([i, column] for i, table in enumerate(tables) for column in content[table])]
    ids = [i for i, (_, column) in enumerate(columns) if column == "id"]
    keys = [[i, ids[0]] for i, (_, column) in enumerate(columns) if column.endswith("_id")]
    number = [column in NUMBERS or column.endswith("id") for _, column in columns]
    return {"db_id": f"{'_'.join(tables)}_{int(1e6 * share(json.dumps(columns))):06d}",
            "table_names": tables, "table_names_original": tables,
            "column_names": [[i, column.replace("_", " ")] for i, column in columns],
            "column_names_original": columns, "column_types": ["number" if n else "text" for n in number],
            "primary_keys": ids, "foreign_keys": keys}


def make_rows(columns: list[str], known: dict[str, list[str]], rng: random.Random) -> list[list[Any]]:
    """Rows of a table. `known`: values of text columns that have to be there; others are drawn."""
    def column_of(name: str) -> list[Any]:
        if name not in TEXTS:
            return [rng.randint(1, ROWS if name.endswith("_id") else LARGEST) for _ in range(ROWS)]
        given = known.get(name, [])
        values = given + rng.sample([v for v in VALUES if v not in given], SPREAD - len(given))
        return [values[i % SPREAD].strip("'") for i in rng.sample(range(ROWS), ROWS)]
    filled = [list(range(1, ROWS + 1)) if name == "id" else column_of(name) for name in columns]
    return [list(row) for row in zip(*filled)]
