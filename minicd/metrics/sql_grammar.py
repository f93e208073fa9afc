"""The part of SQL that SPIDER's official evaluation reads (Yu et al., 2018), as a parser.

Exact set match stands or falls with what this grammar accepts, so its habits are kept: commas in lists are
optional, what follows a whole query is ignored, an alias holds in the whole text, nothing is known of <>, IS
NULL, LEFT JOIN, lists of values or names for columns, and operators need spaces around them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

AGGREGATES = ("max", "min", "count", "sum", "avg")
COMPARISONS = ("not", "between", "=", ">", "<", ">=", "<=", "!=", "in", "like", "is", "exists")
SET_OPERATIONS = ("intersect", "union", "except")
CLAUSES = ("select", "from", "where", "group", "order", "limit", *SET_OPERATIONS)
JOINS = ("join", "on", "as")
ENDS = (*CLAUSES, ")", ";")  # what ends a list of tables or columns

# Tokens of their own, as in NLTK's words.
SPLIT = re.compile(r"[:,](?!\d)|\.\.+|--|[][(){}<>;@#$%&?!*`«»“”„‘’]")
LAST_PERIOD = re.compile(r"(?<=[^.])\.(?=[])}>\s]*$)")
# Also a period that ends a word inside the text, or a number with no small letter after it.
PERIOD = re.compile(r"(?<![\w.])((?=[\w.]*[^\W\d])[\w.]+\w|\d(?:[\d.]*\d)?(?!\.\s*[a-z;:]))\.(?=[])};]*\s)")


class SqlError(ValueError):
    """A text outside the grammar, or with a name that its database does not have."""


class Column(NamedTuple):
    """A column, "table.column" or "*" in lower case, and the aggregate function around it or ""."""

    aggregate: str
    name: str
    distinct: bool | None


class Expression(NamedTuple):
    """A column, or two with an operator between them, else ""."""

    operator: str
    left: Column
    right: Column | None


class Condition(NamedTuple):
    """`second` is BETWEEN's. A value is a number, a string in double quotes, a Column, a Query, or None."""

    negated: bool
    operator: str
    left: Expression
    value: Any
    second: Any


@dataclass(frozen=True)
class Query:
    """A query's clauses. In lists of conditions, "and" and "or" stand between them."""

    tables: tuple[Any, ...]  # names, or a Query each
    on: tuple[Any, ...]
    distinct: bool | None
    select: tuple[tuple[str, Expression], ...]  # with the aggregate function around each, or ""
    where: tuple[Any, ...]
    group: tuple[Column, ...]
    having: tuple[Any, ...]
    order: tuple[str, tuple[Expression, ...]] | None  # the last direction that is named holds for all
    limit: bool
    combined: tuple[str, Query] | None  # the set operation and what follows it


def parse_sql(text: str, schema: dict) -> Query:
    """The query that the text begins with; `schema` is an entry of tables.json.

    Raises SqlError, a ValueError, where the official evaluation could not read it.
    """
    columns = columns_of(schema)
    words = tokenize(text)
    try:
        return Parser(words, columns, find_aliases(words, columns)).query()
    except RecursionError:
        raise SqlError("its queries are nested too deeply") from None


def columns_of(schema: dict) -> dict[str, list[str]]:
    """Table → its columns, in lower case."""
    columns: dict[str, list[str]] = {name.lower(): [] for name in schema["table_names_original"]}
    tables = list(columns)
    for table, column in schema["column_names_original"]:
        if table >= 0:  # -1 is that of *
            columns[tables[table]].append(column.lower())
    return columns


def tokenize(text: str) -> list[str]:
    """Lower-case words and signs. A string, in quotes of either kind, becomes one token in double quotes."""
    pieces = text.replace("'", '"').split('"')
    if len(pieces) % 2 == 0:
        raise SqlError("a quotation mark has no partner")
    strings = {f"__string_{i}__": f'"{piece}"' for i, piece in enumerate(pieces[1::2])}
    pieces[1::2] = strings
    text = PERIOD.sub(r"\1 . ", LAST_PERIOD.sub(" . ", "".join(pieces)))
    words: list[str] = []
    for word in SPLIT.sub(r" \g<0> ", text).lower().split():
        if word == "=" and words and words[-1] in ("!", ">", "<"):
            words[-1] += word
        else:
            words.append(strings.get(word, word))
    return words


def find_aliases(words: list[str], tables: dict[str, Any]) -> dict[str, str]:
    """Name → what it stands for in the whole text: the last AS of a name wins; tables name themselves."""
    if words[-1:] == ["as"]:
        raise SqlError("nothing follows AS")
    aliases = {words[i + 1]: words[i - 1] for i, word in enumerate(words) if word == "as"}
    for table in tables:
        if table in aliases:
            raise SqlError(f"the alias {table!r} is also a table")
    return aliases | {table: table for table in tables}


class Parser:
    """Recursive descent over the tokens; a method for each rule reads on from `at`."""

    def __init__(self, words: list[str], columns: dict[str, list[str]], aliases: dict[str, str],
                 scope: list[str] | None = None):
        self.words, self.columns, self.aliases = words, columns, aliases
        self.at = 0
        self.scope = scope or []  # the tables of the query at work, where a column's table is not named

    def peek(self) -> str:
        """The next token; empty at the end."""
        return self.words[self.at] if self.at < len(self.words) else ""

    def take(self, *expected: str) -> str:
        """The next token, taken if it is one of these, else empty."""
        word = self.peek()
        if not word or word not in expected:
            return ""
        self.at += 1
        return word

    def need(self, *expected: str) -> str:
        found = self.take(*expected)
        if not found:
            what = "a comparison" if expected == COMPARISONS else repr(expected[0])
            place = f"before {self.peek()!r}" if self.peek() else "at its end"
            raise SqlError(f"{what} is missing {place}")
        return found

    # --- clauses ---

    def query(self) -> Query:
        """FROM is read first: it says which tables the columns of SELECT belong to."""
        outer, self.scope = self.scope, []
        block = self.take("(")
        start = self.at
        try:
            self.at = self.words.index("from", start) + 1
        except ValueError:
            raise SqlError("a query has no FROM") from None
        tables, on = self.tables()
        after, self.at = self.at, start
        distinct, select = self.select()
        self.at = after
        clauses = self.where(), self.group(), self.having(), self.order(), self.limit()
        self.close(block)
        operation = self.take(*SET_OPERATIONS)
        combined = (operation, self.query()) if operation else None
        self.scope = outer
        return Query(tables, on, distinct, select, *clauses, combined)

    def close(self, block: str) -> None:
        while self.take(";"):
            pass
        if block:
            self.need(")")
            while self.take(";"):
                pass

    def tables(self) -> tuple[tuple, tuple]:
        """The tables and the conditions of ON."""
        tables: list[Any] = []
        on: list[Any] = []
        while self.peek() not in ("", *(ENDS if tables else ())):
            block = self.take("(")
            tables.append(self.query() if self.peek() == "select" else self.table())
            if self.take("on"):
                found = self.conditions()
                on += ["and", *found] if on else found
            if block:
                self.need(")")
        if not tables:
            raise SqlError("FROM names no table")
        return tuple(tables), tuple(on)

    def table(self) -> str:
        self.take("join")
        table = self.aliases.get(self.peek())
        if table not in self.columns:
            raise SqlError(f"{self.peek()!r} is no table")
        self.at += 1
        if self.take("as"):
            self.at += 1
        self.scope.append(table)
        return table

    def select(self) -> tuple[bool, tuple]:
        self.need("select")
        distinct, items = bool(self.take("distinct")), []
        while self.peek() not in ("", *CLAUSES):
            items.append((self.take(*AGGREGATES), self.expression()))
            self.take(",")
        return distinct, tuple(items)

    def where(self) -> tuple:
        return tuple(self.conditions()) if self.take("where") else ()

    def having(self) -> tuple:
        return tuple(self.conditions()) if self.take("having") else ()

    def group(self) -> tuple[Column, ...]:
        columns: list[Column] = []
        if self.take("group"):
            self.need("by")
            while self.peek() not in ("", *ENDS):
                columns.append(self.column())
                if not self.take(","):
                    break
        return tuple(columns)

    def order(self) -> tuple[str, tuple] | None:
        if not self.take("order"):
            return None
        self.need("by")
        direction, expressions = "asc", []
        while self.peek() not in ("", *ENDS):
            expressions.append(self.expression())
            direction = self.take("asc", "desc") or direction
            if not self.take(","):
                break
        return direction, tuple(expressions)

    def limit(self) -> bool:
        """Only whether there is one: the official evaluation reads every limit as 1."""
        if not self.take("limit"):
            return False
        if not self.peek():
            raise SqlError("nothing follows LIMIT")
        self.at += 1
        return True

    # --- conditions ---

    def conditions(self) -> list[Any]:
        found: list[Any] = []
        while self.peek():
            found.append(self.condition())
            if self.peek() in (*ENDS, *JOINS):
                break
            if word := self.take("and", "or"):
                found.append(word)
        return found

    def condition(self) -> Condition:
        left = self.expression()
        negated = bool(self.take("not"))
        operator = self.need(*COMPARISONS)
        value, second = self.value(), None
        if operator == "between":
            self.need("and")
            second = self.value()
        return Condition(negated, operator, left, value, second)

    def value(self) -> Any:
        """A query, a string or a number, in brackets or not, or else a column without brackets."""
        start, block = self.at, self.take("(")
        word = self.peek()
        if word == "select":
            value: Any = self.query()
        elif '"' in word:
            value = word
            self.at += 1
        elif is_number(word):
            value = float(word)
            self.at += 1
        else:
            value = self.value_column(start)
        if block:
            self.need(")")
        return value

    def value_column(self, start: int) -> Column:
        """A column, read in what stands before a comma, a bracket, AND or the next clause.

        The rest of that is skipped. OR does not end it, so that a condition after `a = b OR` is lost.
        """
        while self.peek() not in ("", ",", ")", "and", *CLAUSES, *JOINS):
            self.at += 1
        return Parser(self.words[start : self.at], self.columns, self.aliases, self.scope).column()

    # --- columns ---

    def expression(self) -> Expression:
        block = self.take("(")
        left, operator = self.column(), self.take("-", "+", "*", "/")
        right = self.column() if operator else None
        if block:
            self.need(")")
        return Expression(operator, left, right)

    def column(self) -> Column:
        block, aggregate = self.take("("), self.take(*AGGREGATES)
        if aggregate:  # a bracket before the function is left open
            self.need("(")
        distinct, name = bool(self.take("distinct")), self.resolve()
        if block or aggregate:
            self.need(")")
        return Column(aggregate, name, distinct)

    def resolve(self) -> str:
        """The column's full name. Without a table it is the first of the scope's tables that has it."""
        word = self.peek()
        self.at += 1
        if word == "*":
            return word
        if "." in word:
            alias, *rest = word.split(".")
            owners, name = [self.aliases.get(alias, "")], ".".join(rest)
        else:
            owners, name = self.scope, word
        for table in owners:
            if name in self.columns.get(table, ()):
                return f"{table}.{name}"
        raise SqlError(f"{word!r} is no column of its tables" if word else "a column is missing at its end")


def is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
