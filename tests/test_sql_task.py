"""Questions to SQL: prompts, databases and their splits, baselines, both experiments end to end with a tiny decoder."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_databases import tiny_decoder

from data.world.sql_text import sql_tokenizer
from minicd.distill import identity
from minicd.hf.checkpoint import load, save
from minicd.metrics.significance import bootstrap_interval, signed_rank
from minicd.tasks import sql
from minicd.tasks.folder import RunFolder
from minicd.tasks.parts import sql_eval
from minicd.tasks.parts.inputs import pool
from minicd.tasks.parts.sql_eval import SqlEval, check_rows, load_databases, one_line, sql_prompt
from minicd.tasks.run import train
from minicd.tasks.sql import Sql, SqlSettings
from minicd.tasks.sql_long import LongSettings, LongSql

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data" / "databases"
SPIDER = ROOT.parent / "shared" / "data" / "spider"
CPU = torch.device("cpu")
SMALL = dict(databases=2, practice_inputs=6, epochs=1.0, batch_size=4, label_samples=5, test_instances=3, max_new_tokens=5,
             precision="fp32")


# --- how sure a difference is ---


def test_the_interval_holds_the_mean_and_narrows_with_more_units():
    low, high = bootstrap_interval([[5.0], [5.0], [5.0]])
    assert low == high == 5.0
    rng = np.random.default_rng(0)
    few, many = (bootstrap_interval(rng.normal(10, 4, (n, 3)).tolist()) for n in (4, 64))
    assert few[0] < 10 < few[1] and many[0] < 10 < many[1] and many[1] - many[0] < few[1] - few[0]
    spread = bootstrap_interval([[0.0, 20.0]] * 64)  # repeats are drawn anew, too, the same ones for all units
    assert spread[0] <= 5 and spread[1] >= 15
    with pytest.raises(ValueError, match="needs a table of units and repeats"):
        bootstrap_interval([])


def test_signed_ranks_by_hand():
    assert signed_rank([1, 2, 3]) == pytest.approx(1 / 8)
    assert signed_rank([0.1 + 0.2, -0.3, 0.3, 0.3, 5]) == signed_rank([3, -3, 3, 3, 50])  # no tie is broken by rounding
    assert signed_rank([-1, 2, 3]) == pytest.approx(2 / 8)  # 5 or 6 of the ranks' sum
    assert signed_rank([1, 1, 0, -1]) == pytest.approx(4 / 8)  # ranks 2, 2, 2; zeros are dropped
    assert signed_rank([-1, -2]) == 1.0 and signed_rank([0, 0]) == 1.0
    assert signed_rank([5] * 8) == pytest.approx(2**-8) and signed_rank(np.arange(1, 101)) == pytest.approx(2.0**-100)


# --- databases and prompts ---


def test_prompts():
    database = load_databases(DATA)[0]
    one, two = database.others[:2]
    bare = database.prompt()("largest fnep")
    assert bare.splitlines()[1:] == ["Question: largest fnep", "SQL:"]
    assert database.name.startswith("_".join(database.schema["table_names"]))
    told = database.prompt([one, two])("largest\nfnep").splitlines()
    assert told[0] == bare.splitlines()[0] and told[1:] == [
        f"Question: {one.question}", f"SQL: {one.query} ;", f"Question: {two.question}", f"SQL: {two.query} ;",
        "Question: largest fnep", "SQL:"]


def test_tests_examples_and_pool_are_disjoint_and_of_the_seed():
    for database in load_databases(DATA):
        tests = {question.question for question in database.tests}
        examples, others = database.draw(0)
        shown = {question.question for question in examples}
        assert len(tests) == 80 and len(shown) == 8 and len(set(others)) == len(others) == 152
        assert not tests & shown and not tests & set(others) and not shown & set(others)
        assert database.draw(0)[0] == examples != database.draw(1)[0]


@pytest.mark.parametrize("name, content, sentence", [
    ("rows.json", "[]", "rows.json does not hold the rows of each table"),
    ("rows.json", "{", "rows.json is damaged"),
    ("dev.json", "[]", "dev.json: its list is empty"),
    ("tables.json", None, "tables.json cannot be read")])
def test_damaged_files_are_named(tmp_path, name, content, sentence):
    small_data(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        load_databases(tmp_path)


def test_a_name_that_leads_out_of_the_run_folder_is_refused(tmp_path):
    small_data(tmp_path)
    for name in ("tables.json", "dev.json"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace(json.loads((DATA / "tables.json").read_text())[1]["db_id"], "../away"))
    with pytest.raises(ValueError, match="tables.json: the db_id '../away' has more than letters"):
        load_databases(tmp_path)


def small_data(folder: Path, databases: int = 3, questions: int = 30) -> Path:
    """Some questions of the first databases."""
    schemas = json.loads((DATA / "tables.json").read_text())[:databases]
    asked = json.loads((DATA / "dev.json").read_text())
    kept = [q for schema in schemas for q in [q for q in asked if q["db_id"] == schema["db_id"]][:questions]]
    for name, content in (("tables.json", schemas), ("dev.json", [*kept, kept[0]]),
                          ("rows.json", json.loads((DATA / "rows.json").read_text()))):
        (folder / name).write_text(json.dumps(content))
    return folder


def test_a_question_that_stands_twice_counts_once(tmp_path):
    assert [len(database.questions) for database in load_databases(small_data(tmp_path))] == [30, 30, 30]


def test_what_is_asked_twice_in_a_row_stays_together():
    database = load_databases(DATA)[0]
    some = [q for q in database.questions[:6] for _ in range(2)]
    halved = replace(database, questions=some[:3] + some[4:9])  # 8 // 3 = 2 ends with the first pair
    assert len(halved.tests) == 2 and len(replace(database, questions=some[:9]).tests) == 4
    assert halved.tests + halved.others == halved.questions


# --- scores ---


def test_a_score_knows_right_queries_and_results(monkeypatch):
    database, tokenizer = load_databases(DATA)[0], sql_tokenizer()
    queries = [test.query for test in database.tests[:4]]
    other = database.others[0].query
    for said, percent in ((queries, 100), ([*queries[:3], "select ( ;"], 75), ([*queries[:2], other[:20], "drop table x"], 50)):
        monkeypatch.setattr(sql_eval, "generate", lambda *how, said=said, **more: [tokenizer.backend.encode(q).ids for q in said])
        settings = SqlEval(test_instances=4, max_new_tokens=40)
        found = sql_eval.score(tiny_decoder(tokenizer, 0), tokenizer, database, database.prompt(), settings)
        assert found == {"match": percent, "execution": percent}


# --- the experiments, whole ---


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("model"), sql_tokenizer()
    save(tiny_decoder(tokenizer, 0), tokenizer, folder)
    return folder


@pytest.fixture
def quick(monkeypatch):
    """A random model never ends a question: its own inputs are a pool. Disks may be slow."""
    monkeypatch.setattr("os.fsync", lambda file: None)
    forbidden = []

    def stands_in(model, tokenizer, examples, shots, longest, tests, *how):
        forbidden.append((examples, tests))
        return pool([f"largest {word}" for word in "fnep zmox dwop".split()])
    monkeypatch.setattr(sql, "few_shot_inputs", stands_in)
    return forbidden


def times(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix == ".safetensors"}


def test_examples_are_distilled_and_descended_on(model, quick, tmp_path, capsys):
    settings = SqlSettings(model=str(model), data=str(small_data(tmp_path)), descent_epochs=2, **SMALL)
    out = tmp_path / "run"
    train("sql", Sql, settings, [0, 1], out, CPU)
    record, said = json.loads((out / "record.json").read_text()), capsys.readouterr().out
    for n in (4, 8):
        for row in ("teacher", "before", "after", "written", "best", "last"):
            assert len(record["metrics"][f"{row}_{n}"]["values"]) == len(record["metrics"][f"{row}_{n}_execution"]["values"]) == 2
        assert {*record["rates_in_1e-5"][str(n)]} == {"best", "last"} and min(record["rates_in_1e-5"][str(n)].values()) >= 10
    assert set(record["leads"]) == {"after_4", "after_8", "written_4", "written_8"} and len(record["by_seed"]) == 2
    assert len(record["by_database"]) == 2 and set(record["files"]) == {"tables.json", "dev.json", "rows.json"}
    assert "One practice item" in said and "| student before | " in said and "27.7" in said and "95 % interval" in said
    for examples, tests in quick:
        assert len(examples) in (4, 8) and not any(example in tests for example in examples)
    before = times(out)
    train("sql", Sql, settings, [0, 1], out, CPU)
    assert json.loads((out / "record.json").read_text())["metrics"] == record["metrics"] and times(out) == before
    assert Sql.headline(record)


def test_the_model_is_not_tuned_where_learning_rates_are_chosen(tmp_path):
    made = Sql(SqlSettings(databases=2), 0, RunFolder(tmp_path, CPU))
    rated, tuned, others = ([d.name for d in databases] for databases in (made.rated, made.tuned_on(), made.databases[1]))
    assert rated and tuned and not set(rated) & set(tuned) and sorted(rated + tuned) == sorted(others)


def test_more_examples_than_fit_are_distilled_by_a_tuned_model(model, quick, tmp_path, capsys):
    settings = LongSettings(model=str(model), data=str(small_data(tmp_path)), teachers=3, tuning_items=6, tuning_epochs=1.0, **SMALL)
    out = tmp_path / "run"
    train("sql_long", LongSql, settings, [0], out, CPU)
    record, said = json.loads((out / "record.json").read_text()), capsys.readouterr().out
    assert {"teacher", "all", "before", "after", "before_bare", "simultaneous", "sequential", "recursive"} <= set(record["metrics"])
    assert record["gain"]["databases"] == 2 and 0 < record["gain"]["p_value"] <= 1
    assert "signed-rank test" in said and LongSql.headline(record)
    tuned, start = (load(folder)[0] for folder in (out / "tuned", model))
    assert not torch.equal(tuned.tokens.weight, start.tokens.weight)


def experiment(kind, settings, tmp_path):
    return kind(settings, 0, RunFolder(tmp_path / "run", CPU))


def test_what_teacher_and_student_see(model, quick, tmp_path):
    data = str(small_data(tmp_path))
    made = experiment(Sql, SqlSettings(model=str(model), data=data, **SMALL), tmp_path)
    assert len(made.tested) == 2 and len(made.databases[1]) == 1
    for database in made.tested:
        examples, questions = database.draw(0)
        for n in (4, 8):
            context = made.context(database, n, "after")
            assert context.extract is identity
            [x] = context.inputs(1, np.random.default_rng(0))
            assert x in questions and x not in {test.question for test in database.tests}
            assert context.teachers[0](x) == sql_prompt(database.schema, examples[:n], x)
            assert context.student(x) == sql_prompt(database.schema, [], x)
    long = experiment(LongSql, LongSettings(model=str(model), data=data, **SMALL), tmp_path)
    database = long.tested[0]
    [[context]] = long.schedule(database, "after")
    prompts = {template("x") for template in context.teachers}
    assert len(context.teachers) == 8 and len(prompts) > 4 and all(prompt.count("Question:") == 5 for prompt in prompts)
    examples = database.draw(0)[0]
    assert context.student("x") == sql_prompt(database.schema, examples[:4], "x")
    assert all(sum(example.question in template("x") for template in context.teachers) == 4 for example in examples)
    for row, shape in (("simultaneous", [2]), ("sequential", [1, 1]), ("recursive", [1, 1])):
        rounds = long.schedule(database, row)
        assert [len(contexts) for contexts in rounds] == shape
        first, second = [context for contexts in rounds for context in contexts]
        assert first.teacher("x") == sql_prompt(database.schema, examples[:4], "x")
        assert second.teacher("x") == sql_prompt(database.schema, examples[4:], "x")
        assert first.student("x") == second.student("x") == sql_prompt(database.schema, [], "x")


def test_gradient_descent_sees_all_examples_in_every_step_from_the_same_start(model, tmp_path, monkeypatch):
    settings = SqlSettings(model=str(model), data=str(small_data(tmp_path)), descent_epochs=5, look_every=2, **SMALL)
    made = experiment(Sql, settings, tmp_path)
    batches, weights, looks = [], [], iter([30.0, 50.0, 40.0])
    original = sql.Run.update

    def update(run, prompts, labels):
        batches.append((prompts, labels)), weights.append(run.model.tokens.weight.detach().clone())
        return original(run, prompts, labels)
    monkeypatch.setattr(sql.Run, "update", update)
    monkeypatch.setattr(Sql, "score", lambda *how: {"match": next(looks)})
    database = made.tested[0]
    found = made.descend(database, 4, 1e-2)
    assert found == {"best": {"match": 50.0}, "last": {"match": 40.0}}  # looks after epochs 2, 4 and 5
    assert len(batches) == 5 and all(prompts.shape[0] == 4 for prompts, _ in batches)
    assert torch.equal(weights[0], made.base.tokens.weight) and not torch.equal(weights[0], weights[-1])
    prompts, labels = batches[0]
    for row, tokens, mask, example in zip(prompts, labels.tokens, labels.mask, database.draw(0)[0]):
        text = made.tokenizer.decode([i for i in row.tolist() if i >= 0])
        assert text == " ".join(sql_prompt(database.schema, [], example.question).split())
        assert made.tokenizer.decode(tokens[mask].tolist()) == f"{example.query} ;"


def test_gradient_descent_learns_in_adapters_where_students_do(model, tmp_path, monkeypatch):
    settings = SqlSettings(model=str(model), data=str(small_data(tmp_path)), descent_epochs=1, lora_rank=2, **SMALL)
    made, learning = experiment(Sql, settings, tmp_path), []
    original = sql.Run.update

    def update(run, *batch):
        learning.extend(name for name, weight in run.model.named_parameters() if weight.requires_grad)
        return original(run, *batch)
    monkeypatch.setattr(sql.Run, "update", update)
    monkeypatch.setattr(Sql, "score", lambda *how: {"match": 1.0})
    made.descend(made.tested[0], 4, 1e-2)
    assert learning and all("lora_" in name for name in learning)


def test_rates_are_chosen_on_other_databases(model, tmp_path, monkeypatch):
    made = experiment(Sql, SqlSettings(model=str(model), data=str(small_data(tmp_path)), **SMALL), tmp_path)
    seen = []

    def descend(self, database, n, lr):
        seen.append(database.name)
        return {"best": {"match": 90.0 if lr == pytest.approx(3e-3) else 5.0}, "last": {"match": 80.0 if lr < 2e-4 else 5.0}}
    monkeypatch.setattr(Sql, "descend", descend)
    rates = made.rates(4)
    assert rates == {"best": pytest.approx(3e-3), "last": pytest.approx(1e-4)}
    assert set(seen) == {made.databases[1][0].name} and not set(seen) & {database.name for database in made.tested}
    lonely = experiment(Sql, SqlSettings(model=str(model), data=str(small_data(tmp_path)), **{**SMALL, "databases": 3}), tmp_path)
    with pytest.raises(ValueError, match="no other databases with enough questions to choose"):
        lonely.rates(4)


def test_leads_and_gains_are_over_databases_and_seeds():
    seeds = {str(seed): {name: {"after_4": 80.0 + seed, "best_4": 60.0} for name in "abc"} for seed in (0, 1)}
    record = {"by_seed": seeds, "metrics": dict.fromkeys(["after_4", "best_4", "after_4_execution"])}
    assert Sql.complete(record)["leads"] == {"after_4": {"mean": 20.5, "low": pytest.approx(20.0, abs=0.3), "high": pytest.approx(21.0, abs=0.3)}}
    gains = {"by_database": {str(i): {"before": 50.0, "after": 55.0 + i} for i in range(8)}}
    assert LongSql.complete(gains)["gain"] == {"mean": 8.5, "p_value": 2**-8, "better": 8, "databases": 8}


def test_too_few_databases(model, tmp_path):
    made = experiment(Sql, SqlSettings(model=str(model), data=str(small_data(tmp_path)), **{**SMALL, "databases": 4}), tmp_path)
    with pytest.raises(ValueError, match="4 databases are asked for, but .* has only 3 with enough questions"):
        made.tested


# --- eval.py, real files ---


def test_a_model_can_be_asked_and_examined(model, tmp_path, monkeypatch):
    net, tokenizer = load(model)
    data = str(small_data(tmp_path))
    first, asked = load_databases(tmp_path)[0], []
    with monkeypatch.context() as patch:
        patch.setattr(sql_eval, "generate", lambda model, prompts, *_, **__: asked.extend(prompts) or [tokenizer.encode("select")[:1]])
        for seed, shots in ((0, 0), (3, 4)):
            assert sql_eval.ask(net, tokenizer, "largest fnep", SqlEval(data=data, shots=shots, seed=seed)) == "select"
            assert asked.pop() == tokenizer.encode(first.prompt(first.draw(seed)[0][:shots])("largest fnep"))
    assert sql_eval.ask(net, tokenizer, "largest fnep", SqlEval(data=data, max_new_tokens=3)) is not None
    name = load_databases(tmp_path)[1].name
    said = sql_eval.examine(net, tokenizer, SqlEval(data=data, database=name, test_instances=2, max_new_tokens=3), model)
    assert [line.split(":")[0] for line in said.splitlines()] == [f"{name}, {n} examples" for n in (0, 4, 8)]
    with pytest.raises(ValueError, match="--database nothing: .* has no such database"):
        sql_eval.chosen(SqlEval(data=data, database="nothing"))


def test_real_spider_has_eight_databases_and_twelve_others(tmp_path):
    if not SPIDER.exists():
        pytest.skip("SPIDER's files are not here (shared/data)")
    settings = SqlSettings(**{**Sql.SCALES["spider"], "data": str(SPIDER)})
    tested, others = experiment(Sql, settings, tmp_path).databases
    assert len(tested) == 8 and len(others) == 12 and all(database.rows is None for database in [*tested, *others])
    assert all(len(database.tests) >= 5 for database in tested)
    for database in [*tested, *others]:
        parts = [{one_line(question.query).lower() for question in part} for part in (database.tests, database.others)]
        assert not parts[0] & parts[1], "a query is both tested and shown"


@pytest.mark.parametrize("rows, query, problem", [
    ([{"id": 7}], None, "rows.json: {db}: {table} is no list of rows"), (5, None, "rows.json: {db}: {table} is no list of rows"),
    ([["one"]], None, "rows.json: {db}: row 1 of {table} does not fit"), (None, None, "rows.json has no rows of {db}, which has questions"),
    (None, "select nothing from nowhere", "dev.json: {db}: SQLite refuses the query")])
def test_rows_and_gold_are_tried_before_anything_is_trained(rows, query, problem, tmp_path):
    for name in ("tables.json", "dev.json", "rows.json"):
        (tmp_path / name).write_text((DATA / name).read_text())
    database = load_databases(tmp_path)[0]
    table = database.schema["table_names_original"][0]
    if rows is not None:
        everything = json.loads((DATA / "rows.json").read_text())
        everything[database.name][table] = rows
        (tmp_path / "rows.json").write_text(json.dumps(everything))
    elif not query:
        everything = json.loads((DATA / "rows.json").read_text())
        (tmp_path / "rows.json").write_text(json.dumps(everything | {database.name: {}}))
    with pytest.raises(ValueError, match=problem.format(db=database.name, table=table)):
        check_rows(replace(database, questions=[replace(database.questions[0], query=query)]),
                   tmp_path / "rows.json") if query else load_databases(tmp_path)
