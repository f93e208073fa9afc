"""Queries on a real SQLite database: what counts as the same result, and that a hostile query neither hangs nor writes."""

import os
import time

import pytest

from minicd.metrics.sqlite import QueryError, build_database, execution_match, execution_verdict, run_query

SCHEMA = {"db_id": "farm", "table_names_original": ["Animal", "Field"],
          "column_names_original": [[-1, "*"], [0, "id"], [0, "kind"], [0, "weight"], [1, "id"], [1, "the \"size\""]],
          "column_types": ["text", "number", "text", "number", "number", "number"]}
ROWS = {"Animal": [(1, "cow", 500.5), (2, "hen", 2), (3, "hen", 3), (4, "cow", None)], "Field": [(1, 7), (2, 9)]}
LONG = "replace(replace(replace('aaaaaaaaaa', 'a', 'aaaaaaaaaa'), 'a', 'aaaaaaaaaa'), 'a', 'aaaaaaaaa')"
NESTED = ", ".join(f"a{i} as (select a.x from a{i - 1} a join a{i - 1} b)" for i in range(1, 30))


def flattened(levels: int) -> str:
    query = "select weight a from animal"
    for _ in range(levels):
        query = f"select (a+a+a+a)+(a+a+a+a) as a from ({query})"
    return query


@pytest.fixture
def farm():
    return build_database(SCHEMA, ROWS)


def test_rows_and_types(farm):
    assert run_query("SELECT * FROM Animal WHERE kind = 'cow'", farm) == (3, [(1, "cow", 500.5), (4, "cow", None)])
    assert run_query('select "the ""size""" from field order by 1 desc', farm).rows == [(9,), (7,)]
    assert run_query("SELECT id FROM animal WHERE 1 = 0;", farm) == (1, [])


VERDICTS = [
    ("right", "SELECT kind FROM animal", "SELECT kind FROM animal ORDER BY weight"),
    ("right", "SELECT kind FROM animal ORDER BY id", "SELECT kind FROM animal ORDER BY id ASC"),
    ("wrong", "SELECT kind , id FROM animal ORDER BY id", "SELECT kind , id FROM animal ORDER BY id DESC"),
    ("right", "SELECT id FROM animal WHERE id IN (SELECT id FROM field ORDER BY id)", "SELECT id FROM field ORDER BY id DESC"),
    ("right", "SELECT id FROM animal WHERE kind != ' order by ' -- order by", "SELECT id FROM animal ORDER BY id DESC"),
    ("wrong", "SELECT kind FROM animal", "SELECT DISTINCT kind FROM animal"),
    ("wrong", "SELECT id , kind FROM animal", "SELECT kind , id FROM animal"),
    ("wrong", "SELECT id FROM animal WHERE id > 9", "SELECT id , kind FROM animal WHERE id > 9"),
    ("right", "SELECT sum(weight) FROM animal", "SELECT 0.1 + 0.2 + 505.2 FROM field WHERE id = 1"),
    ("right", "SELECT count(*) FROM field", "SELECT 2.0"), ("right", "SELECT 123456789012", "SELECT 123456789012.0"),
    ("wrong", "SELECT 123456789012", "SELECT 123456789013"), ("wrong", "SELECT 0.25", "SELECT 0.2500001"),
    ("wrong", "SELECT count(*) FROM field", "SELECT '2'"),
    ("right", "WITH a AS (SELECT id FROM animal) SELECT count(*) FROM a", "SELECT count(*) FROM animal"),
    ("invalid", "SELECT id FROM field", "SELECT nothing FROM field"), ("invalid", "SELECT id FROM field", "SELECT id FROM"),
    ("invalid", "SELECT id FROM field", ""), ("invalid", "SELECT id FROM field", "SELECT 1; SELECT 2"),
    ("forbidden", "SELECT id FROM field", "DELETE FROM field"),
    ("endless", "SELECT id FROM field", "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x FROM c) SELECT max(x) FROM c")]


@pytest.mark.parametrize("verdict, gold, prediction", VERDICTS)
def test_verdicts(farm, verdict, gold, prediction):
    assert execution_verdict(prediction, gold, farm) == verdict
    assert execution_match(prediction, gold, farm) is (verdict == "right")


@pytest.mark.parametrize("gold", ["SELECT nothing FROM animal", "DROP TABLE animal", "oops", ""])
def test_a_gold_query_that_does_not_run(farm, gold):
    with pytest.raises(ValueError, match=f"^the gold query '{gold}' does not run: "):
        execution_match("SELECT id FROM animal", gold, farm)


HOSTILE = {
    "forbidden": [
        "attach 'x.db' as x", "attach ':memory:' as x", "detach main", "pragma journal_mode = wal", "vacuum", "vacuum into 'x.db'", "begin",
        "commit", "savepoint x", "insert into animal values (5, 'cat', 4)", "replace into animal values (1, 'cat', 4)",
        "update animal set id = 1", "delete from animal", "drop table animal", "create table x (a)", "create temp table x as select 1",
        "create view x as select 1", "create trigger x after insert on animal begin select 1; end", "alter table animal rename to x",
        "analyze", "select load_extension('x')", "select * from pragma_table_info('animal')", "select * from sqlite_master",
        "with a as (select 1) delete from animal", "select random()", "select * from animal order by random()", "select zeroblob(1000000000)",
        "select printf('%.*c', 1000000000, 'x')", "select hex(randomblob(1000000000))"],
    "invalid": ["select writefile('x.db', 'x')", "select readfile('x.db')", "select 1; drop table animal", "select ?", "select :a",
                "select 1\0", "select '\ud800'", "-- nothing", "select " + "(" * 3000, "select " + "1+" * 1000 + "1",
                " union ".join(["select 1"] * 100), "select cast(x'ff' as text)"],
    "endless": [
        "select count(*) from " + ", ".join(f"animal a{i}" for i in range(20)), "select 1 from " + ", ".join(f"animal a{i}" for i in range(20)),
        "with recursive c(x) as (select 1 union all select x + 1 from c) select * from c",
        "with recursive c(x) as (select 1 union all select x + 1 from c) select x from c order by x",
        f"select {LONG} || {LONG}", "with recursive c(s) as (select 'a' union all select s || s from c) select max(s) from c",
        f"select replace({LONG}, 'a', {LONG})", "select '" + "x" * 100_000 + "'", f"with a0 as (select 1 x), {NESTED} select * from a29",
        flattened(8)]}


@pytest.mark.parametrize("reason, text", [(reason, text) for reason, texts in HOSTILE.items() for text in texts])
def test_hostile_queries(farm, reason, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QueryError) as caught:
        run_query(text, farm)
    assert caught.value.reason == reason and str(caught.value)
    assert os.listdir() == []
    assert run_query("SELECT * FROM animal", farm).rows == ROWS["Animal"] and len(run_query("SELECT * FROM field", farm).rows) == 2


def test_slow_steps_end_with_the_clock(farm):
    slow = f"with recursive c(x, s) as (select 1, {LONG} union all select x + 1, s from c) select count(*) from c where s like '%_%_%b'"
    start = time.monotonic()
    with pytest.raises(QueryError) as caught:
        run_query(slow, farm, steps=10**12, seconds=0.2)
    assert caught.value.reason == "endless" and time.monotonic() - start < 60


def test_steps_and_rows_are_limits(farm):
    count = "with recursive c(x) as (select 1 union all select x + 1 from c where x < 2000) select {} from c"
    assert run_query(count.format("max(x)"), farm).rows == [(2000,)]
    assert len(run_query(count.format("x"), farm, rows=2000).rows) == 2000
    for limits in ({"steps": 5000}, {"rows": 1999}):
        with pytest.raises(QueryError) as caught:
            run_query(count.format("x"), farm, **limits)
        assert caught.value.reason == "endless"


def test_a_result_of_very_long_rows_ends(farm):
    wide = ", ".join(["s"] * 90)
    text = (f"with recursive c(x, s) as (select 1, {LONG} union all select x + 1, s from c where x < 5000) "
            f"select {wide} from c")
    with pytest.raises(QueryError, match="its rows have more than .* letters") as caught:
        run_query(text, farm, seconds=60)
    assert caught.value.reason == "endless"


def test_a_built_database_is_closed_to_writing(farm):
    with pytest.raises(Exception, match="not authorized"):
        farm.execute("DELETE FROM animal")


@pytest.mark.parametrize("rows, problem", [
    ({"Barn": []}, "there are rows for 'Barn', which is no table of farm"),
    ({"Field": [(1, 2), (3,)]}, "row 2 of Field does not fit"), ({"Field": [(1, [])]}, "row 1 of Field does not fit"),
    ({"Field": [(2**70, 1)]}, "row 1 of Field does not fit"), ({"Field": [3]}, "row 1 of Field does not fit")])
def test_rows_that_do_not_fit(rows, problem):
    with pytest.raises(ValueError, match=f"^{problem}"):
        build_database(SCHEMA, rows)


def test_a_table_that_cannot_be_made_is_named():
    named = ["a\0b" if name == "Animal" else name for name in SCHEMA["table_names_original"]]
    with pytest.raises(ValueError, match="the table 'a.x00b' cannot be made"):
        build_database({**SCHEMA, "table_names_original": named}, {})
