"""Execution accuracy: queries that a model wrote, run on a real SQLite database in memory.

Such a query is data, not trusted code. An authorizer lets it only read the database's own tables and call
functions that depend on nothing else but the clock; SQLite's limits bound the length of texts and the
number of clauses; and a count of steps ends what runs too long. A clock is behind the count, for queries of
slow steps.
"""

from __future__ import annotations

import math
import re
import sqlite3
import time
from collections import Counter
from typing import Any, Mapping, NamedTuple, Sequence

STEPS = 1_000_000  # instructions of SQLite's virtual machine that a query may take
SECONDS = 5.0
ROWS = 10_000
LENGTH = 10_000  # bytes of a query, a text or a stored row
LETTERS = 10_000_000  # of all rows of a result
LIMITS = {sqlite3.SQLITE_LIMIT_LENGTH: LENGTH, sqlite3.SQLITE_LIMIT_SQL_LENGTH: LENGTH,
          sqlite3.SQLITE_LIMIT_COLUMN: 100, sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
          sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 20, sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 100,
          sqlite3.SQLITE_LIMIT_ATTACHED: 0, sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0}
FUNCTIONS = frozenset("""
    abs avg ceil ceiling coalesce concat concat_ws count cume_dist date datetime dense_rank first_value floor
    glob group_concat ifnull iif instr julianday lag last_value lead length like lower ltrim max min mod
    nth_value ntile nullif percent_rank power rank replace round row_number rtrim sign sqrt strftime
    string_agg substr substring sum time total trim trunc typeof unicode upper""".split())
TYPES = {"number": "NUMERIC", "text": "TEXT", "time": "TEXT"}  # of tables.json; others keep values as is
COPIES = 1_000_000  # of inner queries and their columns
COMMENT = r"--[^\n]*|/\*.*?(?:\*/|\Z)"
TOKEN = re.compile(rf"""'[^']*'|"[^"]*"|`[^`]*`|\[[^]]*\]|{COMMENT}|\w+|[(),]""", re.DOTALL)
INTRODUCE = ("from", "join", "as", "materialized", ",", "(")  # what stands before a query in FROM or WITH
KEYWORDS = frozenset("""
    ( ) , select distinct from join inner left outer cross on as where and or not in is null like between
    exists group order by having limit offset asc desc union all intersect except with recursive case when
    then else end""".split())


class QueryError(ValueError):
    """A query that gives no result. `reason`: "invalid", "forbidden" or "endless" (beyond a limit)."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Result(NamedTuple):
    """The rows, in their order, and how many columns they have, even without a row."""

    columns: int
    rows: list[tuple]


# --- the database ---


def build_database(schema: dict, rows: Mapping[str, Sequence[Sequence[Any]]]) -> sqlite3.Connection:
    """A database in memory with the tables of an entry of tables.json and these rows, by table.

    After that it can only be read. Raises ValueError for rows that do not fit, with table and number.
    """
    connection = sqlite3.connect(":memory:", isolation_level=None, cached_statements=0)
    connection.execute("PRAGMA temp_store = MEMORY")  # sorting makes no files
    names = schema["table_names_original"]
    for table in rows:
        if table not in names:
            raise ValueError(f"there are rows for {table!r}, which is no table of {schema['db_id']}")
    connection.execute("BEGIN")
    for i, table in enumerate(names):
        if not table.lower().startswith("sqlite_"):  # some entries list a table of SQLite's own
            fill(connection, table, definitions(schema, i), rows.get(table, ()))
    connection.execute("COMMIT")
    return guarded(connection)


def definitions(schema: dict, table: int) -> list[str]:
    """What CREATE TABLE says of each column of the table with this number."""
    return [f"{quoted(name)} {TYPES.get(kind, '')}".strip() for (owner, name), kind
            in zip(schema["column_names_original"], schema["column_types"]) if owner == table]


def fill(connection: sqlite3.Connection, table: str, columns: list[str], rows: Sequence[Sequence]) -> None:
    try:
        connection.execute(f"CREATE TABLE {quoted(table)} ({', '.join(columns)})")
    except (sqlite3.Error, ValueError) as error:
        raise ValueError(f"the table {table!r} cannot be made: {error}") from None
    insert = f"INSERT INTO {quoted(table)} VALUES ({', '.join('?' * len(columns))})"
    for number, row in enumerate(rows, 1):
        try:
            connection.execute(insert, tuple(row))
        except (sqlite3.Error, OverflowError, TypeError, UnicodeError) as error:
            raise ValueError(f"row {number} of {table} does not fit: {error}") from None


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def guarded(connection: sqlite3.Connection) -> sqlite3.Connection:
    """Close the connection to everything but reading, for good."""
    for limit, value in LIMITS.items():
        connection.setlimit(limit, value)
    Guard().install(connection)
    return connection


class Guard:
    """What one query may do, and how much of it.

    SQLite asks `authorize` about each thing that a query means to do, before it runs, and calls `tick` while
    it runs.
    """

    EVERY = 1000  # steps between two calls of `tick`

    def __init__(self, steps: int = STEPS, seconds: float = SECONDS):
        self.ticks, self.deadline = max(1, steps // self.EVERY), time.monotonic() + seconds
        self.refused, self.spent = "", False

    def install(self, connection: sqlite3.Connection) -> None:
        connection.set_authorizer(self.authorize)
        connection.set_progress_handler(self.tick, self.EVERY)

    def tick(self) -> bool:
        """Whether to stop here."""
        self.ticks -= 1
        self.spent = self.spent or self.ticks < 0 or time.monotonic() > self.deadline
        return self.spent

    def authorize(self, action: int, first: str | None, second: str | None, *place: str | None) -> int:
        self.spent = self.spent or time.monotonic() > self.deadline
        self.refused = self.refused or self.offence(action, first or "", second or "")
        return sqlite3.SQLITE_DENY if self.refused or self.spent else sqlite3.SQLITE_OK

    def offence(self, action: int, first: str, second: str) -> str:
        """What is wrong with it; empty where nothing is."""
        if action == sqlite3.SQLITE_READ:  # CTEs are read, too, so that a list of tables would not do
            return f"it reads {first}" if first.lower().startswith(("sqlite_", "pragma_", "json_")) else ""
        if action == sqlite3.SQLITE_FUNCTION:
            return "" if second.lower() in FUNCTIONS else f"it calls {second}"
        allowed = action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE)
        return "" if allowed else "it does more than to read"


# --- queries ---


def run_query(text: str, connection: sqlite3.Connection, steps: int = STEPS, seconds: float = SECONDS,
              rows: int = ROWS) -> Result:
    """Run one query that may only read. The connection is from `build_database` or was `guarded`.

    Raises QueryError where SQLite refuses it, it does more than to read, or it goes beyond a limit.
    """
    if copies(text) > math.log(COPIES):
        raise QueryError("endless", "its inner queries use each other too often")
    guard = Guard(steps, seconds)
    guard.install(connection)
    try:
        cursor = connection.execute(text)
        if cursor.description is None:
            raise QueryError("invalid", "it holds no query")
        found = fetched(cursor, rows)
        cursor.close()
    except (sqlite3.Error, sqlite3.Warning, MemoryError, UnicodeError, ValueError) as error:
        raise reason_of(error, guard) from None
    return Result(len(cursor.description), found)


def fetched(cursor: sqlite3.Cursor, rows: int) -> list[tuple]:
    """All rows of a result. Raises QueryError where they are too many, or too long."""
    found, letters = [], 0
    for row in cursor:
        found.append(row)
        letters += sum(len(value) for value in row if isinstance(value, (str, bytes)))
        if len(found) > rows or letters > LETTERS:
            raise QueryError("endless", f"it has more than {rows} rows" if len(found) > rows else
                             f"its rows have more than {LETTERS} letters")
    return found


def reason_of(error: Exception, guard: Guard) -> QueryError:
    if isinstance(error, QueryError):
        return error
    if guard.refused:
        return QueryError("forbidden", guard.refused)
    code = getattr(error, "sqlite_errorcode", None)
    too_big = isinstance(error, (MemoryError, sqlite3.DataError)) or code == sqlite3.SQLITE_TOOBIG
    if guard.spent or too_big:
        return QueryError("endless", "it takes too many steps" if guard.spent else "a text in it is too long")
    return QueryError("invalid", str(error))


def execution_match(prediction: str, gold: str, connection: sqlite3.Connection) -> bool:
    """Whether both queries have the same result on the database; see `execution_verdict`."""
    return execution_verdict(prediction, gold, connection) == "right"


def execution_verdict(prediction: str, gold: str, connection: sqlite3.Connection) -> str:
    """"right", "wrong", or why the prediction has no result: "invalid", "forbidden", "endless".

    The results are the same if they have the same rows as often, in the same order where the gold query
    orders its result, as in test-suite evaluation (Zhong et al., 2020), but for two things. Columns stand in
    the gold query's order: the test suite tries every order, but on a small database two columns are too
    often equal by chance. And only an ORDER BY of the whole result asks for an order: the test suite looks
    for the words in inner queries, too. A result without rows still needs as many columns. Raises ValueError
    for a gold query that does not run.
    """
    try:
        expected = run_query(gold, connection)
    except QueryError as error:
        raise ValueError(f"the gold query {gold!r} does not run: {error}") from None
    try:
        found = run_query(prediction, connection)
    except QueryError as error:
        return error.reason
    same = found.columns == expected.columns and same_rows(found.rows, expected.rows, orders_result(gold))
    return "right" if same else "wrong"


def same_rows(found: list[tuple], expected: list[tuple], in_order: bool) -> bool:
    """Fractions are equal if ten digits are: a sum depends on the order of what it adds."""
    found, expected = ([tuple(map(comparable, row)) for row in rows] for rows in (found, expected))
    return found == expected if in_order else Counter(found) == Counter(expected)


def comparable(value: Any) -> Any:
    return float(f"{value:.10g}") if isinstance(value, float) and not value.is_integer() else value


def orders_result(query: str) -> bool:
    """Whether the query has an ORDER BY outside of all brackets."""
    depth = 0
    for word in words(query):
        depth += {"(": 1, ")": -1}.get(word, 0)
        if word == "order" and depth == 0:
            return True
    return False


def copies(query: str) -> float:
    """The logarithm of how often SQLite may have to copy inner queries, before it asks or counts anything.

    What WITH defines is copied to wherever it is used, and columns of a query in FROM into the clauses around
    it: a few lines, each of which uses the last one twice, would take for ever. n names that stand for k such
    queries make at most (n / k) ^ k copies.
    """
    found = words(query)
    names = sum(word not in KEYWORDS for word in found)
    inner = sum(bracket == "(" and word in ("select", "with", "values", "(") and before in INTRODUCE
                for before, bracket, word in zip(found, found[1:], found[2:]))
    return max((k * math.log(names / k) for k in range(1, inner + 1) if names), default=0.0)


def words(query: str) -> list[str]:
    """Words, brackets and commas in lower case, without comments; ' for each string or quoted name."""
    tokens = (match.group() for match in TOKEN.finditer(query))
    return ["'" if token[0] in "'\"`[" else token.lower()
            for token in tokens if not token.startswith(("--", "/*"))]
