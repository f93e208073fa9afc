"""SPIDER's exact set match without values (Yu et al., 2018), as its official evaluation decides it.

Both queries are parsed and compared clause by clause. What counts is not always what a reader expects:

* numbers, strings and columns on the right of a comparison do not count, nor DISTINCT, nor a limit's number;
  but in a query inside FROM values and DISTINCT count, and in one inside a condition DISTINCT does;
* columns that foreign keys connect are the same column, if FROM names the column's table; not in queries
  inside FROM or inside a condition;
* the order of SELECT's columns, of conditions and of joined tables does not count; that of GROUP BY, HAVING
  and ORDER BY does;
* AND and OR count as a set, and the conditions of ON only by the words OR, NOT, IN and LIKE in them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from .sql_grammar import Column, Condition, Expression, Query, SqlError, parse_sql


def sql_exact_match(prediction: str, gold: str, schema: dict) -> bool:
    """Whether the queries match; `schema` is the entry of tables.json of their database.

    A prediction that cannot be read does not match. Raises ValueError for such a gold query.
    """
    try:
        expected = normalised(gold, schema)
    except SqlError as error:
        raise ValueError(f"the gold query {gold!r} cannot be read: {error}") from None
    try:
        return matches(normalised(prediction, schema), expected)
    except SqlError:
        return False


def normalised(text: str, schema: dict) -> Query:
    """The parsed query without what does not count. Raises SqlError where it cannot be read."""
    try:
        query = without_values(parse_sql(text, schema))
        tables = {table for table in query.tables if isinstance(table, str)}
        keys = {column: key for column, key in key_columns(schema).items() if column.split(".")[0] in tables}
        return with_keys(query, keys)
    except RecursionError:
        raise SqlError("its queries are nested too deeply") from None


# --- what does not count ---


def without_values(query: Query) -> Query:
    """Only queries stay on the right of conditions. Queries inside FROM stay as they are."""
    def bare(value: Any) -> Query | None:
        return without_values(value) if isinstance(value, Query) else None

    def strip(condition: Condition) -> Condition:
        return condition._replace(value=bare(condition.value), second=bare(condition.second))

    combined = query.combined and (query.combined[0], without_values(query.combined[1]))
    return replace(query, on=each(strip, query.on), where=each(strip, query.where),
                   having=each(strip, query.having), combined=combined)


def with_keys(query: Query, keys: dict[str, str]) -> Query:
    """Columns become their key column, and DISTINCT goes. Queries inside FROM and conditions stay as they
    are.

    `keys` are those of the first query's tables for all that set operations combine with it, too.
    """
    def column(unit: Column | None) -> Column | None:
        return unit and Column(unit.aggregate, keys.get(unit.name, unit.name), None)

    def expression(unit: Expression) -> Expression:
        return Expression(unit.operator, column(unit.left), column(unit.right))

    def condition(unit: Condition) -> Condition:
        return unit._replace(left=expression(unit.left))

    return replace(
        query, distinct=None, on=each(condition, query.on), where=each(condition, query.where),
        having=each(condition, query.having), group=tuple(map(column, query.group)),
        select=tuple((aggregate, expression(unit)) for aggregate, unit in query.select),
        order=query.order and (query.order[0], tuple(map(expression, query.order[1]))),
        combined=query.combined and (query.combined[0], with_keys(query.combined[1], keys)))


def each(change: Any, conditions: tuple) -> tuple:
    """Change every second entry, where conditions belong; AND or OR there stops the official evaluation."""
    if any(isinstance(entry, str) for entry in conditions[::2]):
        raise SqlError("two conditions have neither AND nor OR between them")
    return tuple(entry if i % 2 else change(entry) for i, entry in enumerate(conditions))


def key_columns(schema: dict) -> dict[str, str]:
    """Column → the first column of those that foreign keys connect with it.

    A pair joins the first group that has one of its columns. Two groups never become one, and a column in
    both goes with the later, as in the official evaluation.
    """
    tables = schema["table_names_original"]
    names = [f"{tables[table]}.{column}".lower() if table >= 0 else "*"
             for table, column in schema["column_names_original"]]
    groups: list[set[int]] = []
    for pair in map(set, schema["foreign_keys"]):
        group = next((group for group in groups if group & pair), None)
        if group is None:
            groups.append(pair)
        else:
            group |= pair
    return {names[column]: names[min(group)] for group in groups for column in group}


# --- what counts ---


def matches(prediction: Query, gold: Query) -> bool:
    return (Counter(prediction.select) == Counter(gold.select)
            and Counter(prediction.where[::2]) == Counter(gold.where[::2])
            and set(prediction.where[1::2]) == set(gold.where[1::2])
            and names(prediction.group) == names(gold.group)
            and prediction.having == gold.having
            and prediction.order == gold.order
            and keywords(prediction) == keywords(gold)
            and combined_match(prediction, gold)
            and Counter(prediction.tables) == Counter(gold.tables))


def names(columns: tuple[Column, ...]) -> list[str]:
    return [column.name for column in columns]


def combined_match(prediction: Query, gold: Query) -> bool:
    if not prediction.combined or not gold.combined:
        return prediction.combined == gold.combined
    return prediction.combined[0] == gold.combined[0] and matches(prediction.combined[1], gold.combined[1])


def keywords(query: Query) -> set[str]:
    """The words that the official evaluation looks for, with the direction of ORDER BY."""
    conditions = query.on[::2] + query.where[::2] + query.having[::2]
    present = {"where": query.where, "group": query.group, "having": query.having, "limit": query.limit,
               "or": "or" in query.on[1::2] + query.where[1::2] + query.having[1::2],
               "not": any(condition.negated for condition in conditions)}
    found = {word for word, there in present.items() if there}
    found |= {condition.operator for condition in conditions} & {"in", "like"}
    return found | set(query.order[:1] if query.order else ())
