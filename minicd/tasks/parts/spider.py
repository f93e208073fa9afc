"""SPIDER's files (Yu et al., 2018): databases as in its tables.json, questions as in its dev.json."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from ...metrics.sql_grammar import SqlError, parse_sql
from ...runtime.files import read_json
from .natural_instructions import check, listed, text


@dataclass(frozen=True)
class Question:
    """A question about a database, and the query that answers it."""

    db_id: str
    question: str
    query: str


def load_schemas(path: Path) -> dict[str, dict]:
    """db_id → its entry of a tables.json, as it stands in the file.

    Raises ValueError with file, entry and key where one is unusable.
    """
    schemas: dict[str, dict] = {}

    def add(entry: Any, where: str) -> None:
        check_schema(entry, where)
        check(entry["db_id"] not in schemas, f"{where}: db_id {entry['db_id']!r} stands twice")
        schemas[entry["db_id"]] = entry

    read_entries(path, add)
    return schemas


def load_questions(path: Path, schemas: dict[str, dict]) -> list[Question]:
    """The questions of a file like dev.json. Other keys than those of `Question` are not read.

    Raises ValueError with file, entry and key: also for an unknown database, and for a query that the
    official evaluation could not read or that names what its database does not have.
    """
    questions: list[Question] = []

    def add(entry: Any, where: str) -> None:
        question = Question(*(text(entry, key, where) for key in ("db_id", "question", "query")))
        check(question.db_id in schemas, f"{where}.db_id: there is no database {question.db_id!r}")
        try:
            parse_sql(question.query, schemas[question.db_id])
        except SqlError as error:
            raise ValueError(f"{where}.query: {question.query!r} cannot be read: {error}") from None
        questions.append(question)

    read_entries(path, add)
    return questions


def read_entries(path: Path, add: Callable[[Any, str], None]) -> None:
    """Give each entry of the file's list to `add`, with its place. Raises ValueError with the file's name."""
    if not Path(path).is_file():
        raise ValueError(f"{path} cannot be read: there is no such file")
    entries = read_json(path, "is not JSON")
    try:
        check(isinstance(entries, list), "it holds no list")
        check(bool(entries), "its list is empty")
        for number, entry in enumerate(entries):
            add(entry, f"entry {number}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# --- a schema ---


def check_schema(entry: Any, where: str) -> None:
    """Raises ValueError where a key is missing or does not fit the others."""
    text(entry, "db_id", where)
    tables = listed(entry, "table_names_original", where=f"{where}.")
    columns = listed(entry, "column_names_original", where=f"{where}.")
    check_names(tables, f"{where}.table_names_original")
    check_columns(columns, len(tables), f"{where}.column_names_original")
    kinds = listed(entry, "column_types", where=f"{where}.")
    check(len(kinds) == len(columns),
          f"{where}.column_types has {len(kinds)} types for {len(columns)} columns")
    check(all(isinstance(kind, str) for kind in kinds), f"{where}.column_types holds what is no string")
    keys = listed(entry, "primary_keys", 0, f"{where}.")
    check(are_columns(keys, columns), f"{where}.primary_keys holds what is no column's number")
    for i, pair in enumerate(listed(entry, "foreign_keys", 0, f"{where}.")):
        check(isinstance(pair, list) and len(pair) == 2 and are_columns(pair, columns),
              f"{where}.foreign_keys[{i}] holds no two columns' numbers")


def check_names(names: list, where: str) -> None:
    check(all(isinstance(name, str) and name.strip() for name in names), f"{where} holds what is no name")
    for name, times in Counter(name.lower() for name in names).items():
        check(times == 1, f"{where}: {name!r} stands twice")


def check_columns(columns: list, tables: int, where: str) -> None:
    """The first is * of no table, [-1, "*"]; each other stands with its table's number; no table has none."""
    check(columns[0] == [-1, "*"], f'{where}[0] is not [-1, "*"]')
    names: list[list[str]] = [[] for _ in range(tables)]
    for i, column in enumerate(columns[1:], 1):
        check(isinstance(column, list) and len(column) == 2, f"{where}[{i}] is no pair of table and name")
        check(is_number(column[0], tables), f"{where}[{i}] is in no table")
        names[column[0]].append(column[1])
    for table, found in enumerate(names):
        check(bool(found), f"{where} has no column of table {table}")
        check_names(found, f"{where}, table {table}")


def are_columns(numbers: list, columns: list) -> bool:
    return all(is_number(number, len(columns)) and number > 0 for number in numbers)


def is_number(value: Any, end: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end


def schema_text(schema: dict) -> str:
    """The tables and columns on one line, in the file's order: "pet ( id , kind ) owner ( id , name )"."""
    parts = []
    for i, table in enumerate(schema["table_names_original"]):
        columns = (name for owner, name in schema["column_names_original"] if owner == i)
        parts.append(f"{table} ( {' , '.join(columns)} )")
    return " ".join(parts)
