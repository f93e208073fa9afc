"""SPIDER's exact set match: each rule on queries of our own, and the official verdicts and parses where they are there."""

import json
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from minicd.metrics import sql_exact_match
from minicd.metrics.sql_grammar import COMPARISONS, Query, SqlError, columns_of, parse_sql, tokenize

SPIDER = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "spider"
# visit.guest_id and bill.guest_id are guest.id; bill.room_id and visit.room_id are room.id.
HOTEL = {
    "db_id": "hotel", "table_names_original": ["Guest", "Visit", "Room", "Bill"],
    "column_names_original": [[-1, "*"], [0, "ID"], [0, "Name"], [0, "Age"], [1, "Guest_ID"], [1, "Room_ID"], [1, "Nights"],
                              [2, "ID"], [2, "Floor"], [2, "Name"], [3, "Guest_ID"], [3, "Amount"], [3, "Paid On"]],
    "column_types": ["text"] * 13, "primary_keys": [1, 7], "foreign_keys": [[4, 1], [10, 1], [5, 7]]}
VISITS = "FROM guest AS T1 JOIN visit AS T2 ON T1.id = T2.guest_id"

SAME = [
    ("case and quotes", "SELECT name FROM guest WHERE name = 'Ann'", 'select NAME from GUEST where Name = "Ann"'),
    ("values", "SELECT name FROM guest WHERE age > 3 AND name = 'Ann'", "SELECT name FROM guest WHERE age > 77 AND name = 'Bo'"),
    ("values of between", "SELECT name FROM guest WHERE age BETWEEN 3 AND 9", "SELECT name FROM guest WHERE age BETWEEN 1 AND 2"),
    ("a value and a column", "SELECT name FROM guest WHERE age > 3", "SELECT name FROM guest WHERE age > id"),
    ("the limit's number", "SELECT name FROM guest ORDER BY age LIMIT 1", "SELECT name FROM guest ORDER BY age LIMIT 9"),
    ("distinct", "SELECT DISTINCT name FROM guest", "SELECT name FROM guest"),
    ("distinct in count", "SELECT count(DISTINCT name) FROM guest", "SELECT count(name) FROM guest"),
    ("order of columns", "SELECT name , age FROM guest", "SELECT age , name FROM guest"),
    ("order of conditions", "SELECT id FROM guest WHERE age > 3 AND name = 'A'", "SELECT id FROM guest WHERE name = 'B' AND age > 1"),
    ("order of mixed words", "SELECT id FROM guest WHERE age > 3 AND name = 'A' OR id = 1",
     "SELECT id FROM guest WHERE name = 'A' OR age > 3 AND id = 1"),
    ("how often AND stands", "SELECT id FROM guest WHERE age > 3 AND age > 4 OR id = 2 OR id = 3",
     "SELECT id FROM guest WHERE age > 3 AND age > 4 AND id = 2 OR id = 3"),
    ("names of aliases", f"SELECT T1.name {VISITS}", "SELECT b.name FROM visit AS a JOIN guest AS b ON a.guest_id = b.id"),
    ("no condition of ON", f"SELECT T1.name {VISITS}", "SELECT guest.name FROM guest JOIN visit"),
    ("another condition of ON", f"SELECT T1.name {VISITS}", "SELECT T1.name FROM guest AS T1 JOIN visit AS T2 ON T1.age > T2.nights"),
    ("foreign keys", f"SELECT T1.id {VISITS}", f"SELECT T2.guest_id {VISITS}"),
    ("foreign keys in groups", f"SELECT count(*) {VISITS} GROUP BY T1.id", f"SELECT count(*) {VISITS} GROUP BY T2.guest_id"),
    ("foreign keys of one key", f"SELECT T2.guest_id {VISITS} JOIN bill AS T3", f"SELECT T3.guest_id {VISITS} JOIN bill AS T3"),
    ("asc", "SELECT name FROM guest ORDER BY age", "SELECT name FROM guest ORDER BY age ASC"),
    ("one direction for all", "SELECT name FROM guest ORDER BY age DESC , id", "SELECT name FROM guest ORDER BY age , id DESC"),
    ("set operations, values", "SELECT id FROM guest WHERE age = 1 UNION SELECT id FROM guest WHERE age = 2",
     "SELECT id FROM guest WHERE age = 3 UNION SELECT id FROM guest WHERE age = 3"),
    ("values of an inner query", "SELECT id FROM guest WHERE age > (SELECT max(age) FROM guest WHERE id = 1)",
     "SELECT id FROM guest WHERE age > (SELECT max(age) FROM guest WHERE id = 2)"),
    ("what follows", "SELECT name FROM guest", "SELECT name FROM guest ; and so on"),
    ("a last period", "SELECT id FROM guest GROUP BY name", "SELECT id FROM guest GROUP BY name."),
    ("a sentence that follows", "SELECT id FROM guest GROUP BY name", "SELECT id FROM guest GROUP BY guest.name. These are all"),
    ("a small letter after a number's period", "SELECT id FROM guest WHERE age = 3 AND id = 1",
     "SELECT id FROM guest WHERE age = 3. and id = 1"),
    ("an empty where", "SELECT name FROM guest", "SELECT name FROM guest WHERE"),
    ("no commas", "SELECT name , age FROM guest", "SELECT name age FROM guest"),
    ("parts of operators", "SELECT name FROM guest WHERE age >= 3", "SELECT name FROM guest WHERE age > = 3"),
    ("after OR a column's condition is lost", "SELECT id FROM guest WHERE age = id", "SELECT id FROM guest WHERE age = id OR age = 3"),
    ("words after a joined column", f"SELECT T1.name {VISITS} JOIN room AS T3", f"SELECT T1.name {VISITS} LEFT JOIN room AS T3"),]
DIFFERENT = [
    ("another column", "SELECT name FROM guest", "SELECT age FROM guest"),
    ("one more column", "SELECT name FROM guest", "SELECT name , age FROM guest"),
    ("a column twice", "SELECT name , age FROM guest", "SELECT name , name FROM guest"),
    ("an aggregate", "SELECT max(age) FROM guest", "SELECT min(age) FROM guest"),
    ("count of all and of one", "SELECT count(*) FROM guest", "SELECT count(id) FROM guest"),
    ("a comparison", "SELECT name FROM guest WHERE age > 3", "SELECT name FROM guest WHERE age >= 3"),
    ("not", "SELECT name FROM guest WHERE name LIKE 'a'", "SELECT name FROM guest WHERE name NOT LIKE 'a'"),
    ("a condition more", "SELECT name FROM guest WHERE age > 3", "SELECT name FROM guest WHERE age > 3 AND id = 1"),
    ("and, or", "SELECT id FROM guest WHERE age > 3 AND name = 'A'", "SELECT id FROM guest WHERE age > 3 OR name = 'A'"),
    ("a table more", "SELECT guest.name FROM guest", "SELECT guest.name FROM guest JOIN visit"),
    ("or in ON", f"SELECT T1.name {VISITS}", "SELECT T1.name FROM guest AS T1 JOIN visit AS T2 ON T1.id = 1 or T1.id = 2"),
    ("order of groups", "SELECT id FROM guest GROUP BY name , age", "SELECT id FROM guest GROUP BY age , name"),
    ("having", "SELECT id FROM guest GROUP BY name HAVING count(*) > 1", "SELECT id FROM guest GROUP BY name HAVING count(*) < 1"),
    ("having's order", "SELECT id FROM guest GROUP BY id HAVING max(age) > 1 AND min(age) > 1",
     "SELECT id FROM guest GROUP BY id HAVING min(age) > 1 AND max(age) > 1"),
    ("no having", "SELECT id FROM guest GROUP BY name HAVING count(*) > 1", "SELECT id FROM guest GROUP BY name"),
    ("direction", "SELECT name FROM guest ORDER BY age DESC", "SELECT name FROM guest ORDER BY age"),
    ("order of the order", "SELECT name FROM guest ORDER BY age , id", "SELECT name FROM guest ORDER BY id , age"),
    ("a limit", "SELECT name FROM guest ORDER BY age LIMIT 1", "SELECT name FROM guest ORDER BY age"),
    ("a limit alone", "SELECT name FROM guest LIMIT 1", "SELECT name FROM guest"),
    ("foreign key of a table not named", "SELECT guest_id FROM visit", "SELECT guest_id FROM bill"),
    ("no foreign key", f"SELECT T2.nights {VISITS}", f"SELECT T1.age {VISITS}"),
    ("set operation", "SELECT id FROM guest UNION SELECT id FROM room", "SELECT id FROM guest EXCEPT SELECT id FROM room"),
    ("sides of a set operation", "SELECT id FROM guest EXCEPT SELECT guest_id FROM visit",
     "SELECT guest_id FROM visit EXCEPT SELECT id FROM guest"),
    ("no set operation", "SELECT id FROM guest UNION SELECT id FROM room", "SELECT id FROM guest"),
    ("distinct in an inner query", "SELECT id FROM guest WHERE id IN (SELECT guest_id FROM visit)",
     "SELECT id FROM guest WHERE id IN (SELECT DISTINCT guest_id FROM visit)"),
    ("ON in an inner query", f"SELECT id FROM room WHERE id IN (SELECT T2.room_id {VISITS})",
     "SELECT id FROM room WHERE id IN (SELECT T2.room_id FROM guest AS T1 JOIN visit AS T2 ON T2.guest_id = T1.id)"),
    ("keys in an inner query", f"SELECT id FROM guest WHERE id IN (SELECT T2.guest_id {VISITS})",
     f"SELECT id FROM guest WHERE id IN (SELECT T1.id {VISITS})"),
    ("an inner query and a value", "SELECT id FROM guest WHERE age > (SELECT max(age) FROM guest)", "SELECT id FROM guest WHERE age > 3"),
    ("values inside FROM", "SELECT count(*) FROM (SELECT id FROM guest WHERE age = 1)",
     "SELECT count(*) FROM (SELECT id FROM guest WHERE age = 2)"),
    ("expressions", "SELECT age + id FROM guest", "SELECT age - id FROM guest")]
UNREADABLE = {
    "an open quote": "SELECT name FROM guest WHERE name = 'O'Hara'", "no FROM": "SELECT 1", "empty": "", "an empty FROM": "SELECT name FROM",
    "<>": "SELECT name FROM guest WHERE age <> 3", "no spaces": "SELECT name FROM guest WHERE age=3",
    "no column": "SELECT nothing FROM guest", "no column of these tables": "SELECT nights FROM guest", "no table": "SELECT id FROM hall",
    "no alias": "SELECT T3.id FROM guest AS T1", "a column's alias": "SELECT count(*) AS n FROM guest",
    "a table with a comma": "SELECT guest.id FROM guest , visit", "an alias without AS": "SELECT t.id FROM guest t",
    "an alias that is a table": "SELECT room.id FROM guest AS room", "left join": "SELECT guest.id FROM guest LEFT JOIN visit",
    "is null": "SELECT id FROM guest WHERE name IS NULL", "a list": "SELECT id FROM guest WHERE age IN (1, 2)",
    "exists": "SELECT id FROM guest WHERE EXISTS (SELECT id FROM guest)", "all": "SELECT id FROM guest UNION ALL SELECT id FROM room",
    "a function": "SELECT lower(name) FROM guest", "backticks": "SELECT `name` FROM guest", "limit without a number": "SELECT id FROM guest LIMIT",
    "group without by": "SELECT id FROM guest GROUP", "AS at the end": "SELECT id FROM guest AS", "an open bracket": "SELECT max(age FROM guest",
    "no subtraction": "SELECT max(age) - min(age) FROM guest", "a value in brackets": "SELECT id FROM guest WHERE age = (id)",
    "two conditions, then AND": "SELECT id FROM guest WHERE age = 1 id = 2 AND age = 3", "with": "WITH a AS (SELECT id FROM guest) SELECT id FROM a",
    "very deep": "SELECT id FROM guest " + "UNION SELECT id FROM guest " * 5000, "a colon": "SELECT : FROM guest",
    "having without group": "SELECT id FROM guest HAVING age > 3", "a period after a value": "SELECT id FROM guest WHERE age = 3.",
    "a sentence after a value": "SELECT id FROM guest WHERE age = 3. SELECT id FROM guest",
    "the last use of an alias wins": "SELECT T1.age FROM guest AS T1 WHERE T1.id IN (SELECT T1.guest_id FROM bill AS T1)"}


@pytest.mark.parametrize("gold, prediction", [row[1:] for row in SAME], ids=[row[0] for row in SAME])
def test_what_does_not_count(gold, prediction):
    assert sql_exact_match(prediction, gold, HOTEL) is True and sql_exact_match(gold, prediction, HOTEL) is True


@pytest.mark.parametrize("gold, prediction", [row[1:] for row in DIFFERENT], ids=[row[0] for row in DIFFERENT])
def test_what_counts(gold, prediction):
    assert sql_exact_match(prediction, gold, HOTEL) is False and sql_exact_match(gold, prediction, HOTEL) is False
    assert sql_exact_match(gold, gold, HOTEL) and sql_exact_match(prediction, prediction, HOTEL)


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read(text):
    assert sql_exact_match(text, "SELECT id FROM guest", HOTEL) is False
    with pytest.raises(ValueError, match="gold query .* cannot be read: "):
        sql_exact_match("SELECT id FROM guest", text, HOTEL)


def test_groups_of_foreign_keys_do_not_merge():
    """a–b, c–d, then b–c joins the first group only, and the later group has the last word on c."""
    schema = {"table_names_original": ["t"], "column_names_original": [[-1, "*"], *([0, name] for name in "abcd")],
              "foreign_keys": [[1, 2], [3, 4], [2, 3]]}
    assert sql_exact_match("SELECT a FROM t", "SELECT b FROM t", schema)
    assert sql_exact_match("SELECT c FROM t", "SELECT d FROM t", schema)
    assert not sql_exact_match("SELECT c FROM t", "SELECT b FROM t", schema)


def test_tokens():
    assert tokenize("SELECT T1.a,b FROM x WHERE c != 'It is' AND d<=-1.5;--") == [
        "select", "t1.a", ",", "b", "from", "x", "where", "c", "!=", '"It is"', "and", "d", "<", "=-1.5", ";", "--"]


def test_errors_name_what_is_wrong():
    for text, problem in {"SELECT nights FROM guest": "'nights' is no column of its tables", "SELECT id FROM hall": "'hall' is no table",
                          "SELECT max(age FROM guest": r"'\)' is missing before 'from'", "SELECT id": "a query has no FROM",
                          "SELECT id FROM guest WHERE age": "a comparison is missing at its end"}.items():
        with pytest.raises(SqlError, match=f"^{problem}$"):
            parse_sql(text, HOTEL)


# --- the official evaluation ---


@cache
def spider(name: str):
    if not (SPIDER / name).exists():
        pytest.skip(f"{SPIDER / name} is not there")
    text = (SPIDER / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)


def test_official_verdicts():
    schemas = {entry["db_id"]: entry for entry in spider("tables.json")}
    pairs = spider("exact_match_sample.jsonl")
    wrong = [p for p in pairs if sql_exact_match(p["pred"], p["gold"], schemas[p["db_id"]]) is not p["exact"]]
    assert len(pairs) == 60 and not wrong


def test_official_parses():
    schemas = {entry["db_id"]: entry for entry in spider("tables.json")}
    for entry in spider("dev.json"):
        schema = schemas[entry["db_id"]]
        assert plain(parse_sql(entry["query"], schema)) == plain(official(entry["sql"], schema)), entry["query"]
        assert sql_exact_match(entry["query"], entry["query"], schema)


def plain(value):
    """Queries as dictionaries and tuples as lists."""
    if isinstance(value, Query):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def official(sql: dict | None, schema: dict):
    """What stands under the key sql of dev.json, with our names in place of its numbers."""
    tables = list(columns_of(schema))
    names = [f"{tables[table]}.{name.lower()}" if table >= 0 else "*" for table, name in schema["column_names_original"]]
    aggregates = ["", "max", "min", "count", "sum", "avg"]

    def column(unit):
        return unit and (aggregates[unit[0]], names[unit[1]], unit[2])

    def expression(unit):
        return ["", "-", "+", "*", "/"][unit[0]], column(unit[1]), column(unit[2])

    def value(item):
        return official(item, schema) if isinstance(item, dict) else column(item) if isinstance(item, list) else item

    def conditions(items):
        return [item if isinstance(item, str) else
                (item[0], COMPARISONS[item[1]], expression(item[2]), value(item[3]), value(item[4])) for item in items]

    order, combined = sql["orderBy"], [(word, official(sql[word], schema)) for word in ("intersect", "union", "except") if sql[word]]
    return {"tables": [tables[item] if kind == "table_unit" else official(item, schema) for kind, item in sql["from"]["table_units"]],
            "on": conditions(sql["from"]["conds"]), "distinct": sql["select"][0],
            "select": [(aggregates[number], expression(unit)) for number, unit in sql["select"][1]],
            "where": conditions(sql["where"]), "group": list(map(column, sql["groupBy"])), "having": conditions(sql["having"]),
            "order": (order[0], list(map(expression, order[1]))) if order else None, "limit": sql["limit"] is not None,
            "combined": combined[0] if combined else None}
