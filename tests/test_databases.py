"""Generated databases: real SQL, a jargon that nobody could guess, disjoint splits; and the base that learns from them."""

import json
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data import make_databases
from data.world import bases, sql_text
from data.world import databases as world
from minicd.decoder import Decoder, initialise
from minicd.hf.checkpoint import load, save
from minicd.metrics.sql import sql_exact_match
from minicd.metrics.sqlite import build_database, run_query
from minicd.tasks.folder import RunFolder
from minicd.tasks.parts.spider import load_questions, load_schemas
from minicd.tasks.parts.sql_eval import sql_prompt
from minicd.tasks.run import train
from minicd.training import FitSettings, fit

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data" / "databases"
CPU = torch.device("cpu")


def drawn(n: int, name: str, split: str = "train", level: world.Level = world.FULL) -> list[world.Database]:
    rng = random.Random(name)
    return [world.draw_database(rng, split, level) for _ in range(n)]


# --- databases and questions ---


@pytest.mark.parametrize("level", range(len(sql_text.LEVELS)))
def test_every_query_is_sql_that_sqlite_runs_and_spider_reads(level):
    rng = random.Random(level)
    for database in drawn(6, f"sql/{level}", level=sql_text.LEVELS[level]):
        connection = build_database(database.schema, database.rows)
        for _ in range(15):
            _, query = database.question(rng)
            assert sql_exact_match(query, query, database.schema)
            assert run_query(query, connection).columns >= 1


def test_all_shapes_are_asked_and_most_have_an_answer():
    rng, empty, shapes = random.Random(1), 0, Counter()
    for database in drawn(30, "shapes"):
        connection = build_database(database.schema, database.rows)
        for _ in range(15):
            question, query = database.question(rng)
            shapes[" ".join("_" if word in world.NONSENSE or word.isdigit() or word in world.FUNCTIONS else word
                            for word in question.split())] += 1
            empty += not run_query(query, connection).rows
    assert len(shapes) >= len(world.SHAPES) - 1  # "over" and "under" differ, functions do not
    assert empty < 45  # of 450


def test_keys_refer_to_rows_that_exist():
    for database in drawn(20, "keys"):
        schema = database.schema
        for column, key in schema["foreign_keys"]:
            places = [schema["column_names_original"][i] for i in (column, key)]
            found = []
            for table, name in places:
                names = [n for t, n in schema["column_names_original"] if t == table]
                rows = database.rows[schema["table_names_original"][table]]
                found.append({row[names.index(name)] for row in rows})
            assert found[0] <= found[1]
        assert 1 <= len(schema["table_names"]) <= 3 and len(schema["column_types"]) == len(schema["column_names"])


def test_a_word_means_something_else_in_every_database():
    meanings = defaultdict(set)
    for database in drawn(400, "jargon"):
        assert len(database.columns) >= 4 and len(database.values) == 2
        assert not set(database.columns) & set(database.values)
        for word, column in database.columns.items():
            meanings[word].add(column)
    assert len(meanings) == len(world.NONSENSE) and min(map(len, meanings.values())) >= 5


def test_no_question_can_be_answered_without_examples():
    """The same words ask for different queries: the best guess for a question is rarely right."""
    rng, asked = random.Random(2), defaultdict(Counter)
    for database in drawn(3000, "guess", level=world.Level(1, 2, 4, 8, 3)):  # of few words, so that questions recur
        question, query = database.question(rng)
        asked[question][query] += 1
    often = [found for found in asked.values() if found.total() >= 20]
    assert len(often) > 10
    assert sum(found.most_common(1)[0][1] for found in often) / sum(found.total() for found in often) < 0.12


def test_all_queries_obey_a_house_style_that_no_question_tells():
    rng = random.Random(3)
    for database in drawn(20, "style"):
        column, value = database.style
        for question, query in (database.question(rng) for _ in range(10)):
            assert f" where {column} = {value}" in query
            assert column not in question.split() and value.strip("'") not in question.split()
    styles = {database.style for database in drawn(50, "styles")}
    assert len(styles) > 40
    shown = "select count ( * ) from {t}"
    assert not sql_exact_match(shown.format(t=database.table), f"{shown.format(t=database.table)} where {column} = {value}",
                               database.schema)


# --- splits ---


def test_databases_of_different_splits_are_different():
    splits = {split: drawn(40, "same", split) for split in world.SPLITS}
    for split, databases in splits.items():
        assert {database.split for database in databases} == {split}
        assert all(replace(database).split == split for database in databases)  # decided by the content alone
    assert {database.split for database in make_databases.draw_databases()} == {"test"}


def test_the_base_sees_training_databases_alone(monkeypatch):
    seen = []
    draw = world.draw_database
    monkeypatch.setattr(world, "draw_database", lambda *how, **more: seen.append(draw(*how, **more)) or seen[-1])
    text = sql_text.SqlText(sql_text.sql_tokenizer(), len(sql_text.LEVELS) - 1, 10, 2, seed=0)
    for step in range(10):
        text[step]
    sql_text.sql_item(random.Random(0), 0.0)
    assert len(seen) > 10 and {database.split for database in seen} == {"train"}
    del seen[:]
    sql_text.judged(1, 5)
    assert seen and {database.split for database in seen} == {"validation"}


@pytest.mark.parametrize("folder, n", [(DATA, make_databases.DATABASES + make_databases.CHOOSING),
                                       (DATA / "wide", make_databases.DATABASES)])
def test_test_questions_are_never_practised(folder, n):
    schemas = load_schemas(folder / "tables.json")
    questions = defaultdict(list)
    for question in load_questions(folder / "dev.json", schemas):
        questions[question.db_id].append(question.question)
    assert len(questions) == len(schemas) == n
    for name, asked in questions.items():
        tests, others = asked[: make_databases.TESTS], asked[make_databases.TESTS :]
        assert len(set(asked)) == len(asked) == 3 * len(tests) == make_databases.TESTS + make_databases.PRACTICE
        assert all(world.share(f"{name} {question}") < world.TESTED for question in tests)
        assert all(world.share(f"{name} {question}") >= world.TESTED for question in others)


def test_wide_databases_have_more_jargon_than_four_examples():
    shares = {level: [] for level in (world.FULL, world.WIDE)}
    for level, found in shares.items():
        for i, database in enumerate(drawn(20, "wide", "test", level)):
            rng, jargon = random.Random(i), {*database.columns, *database.values}
            said = {word for _ in range(4) for word in database.question(rng)[0].split()}
            found.append(len(said & jargon) / len(jargon))
            assert level is world.FULL or len(jargon) == 10
    full, wide = (sum(found) / len(found) for found in shares.values())
    assert wide < full - 0.1


def test_a_database_with_few_questions_says_so():
    database = drawn(1, "few", level=sql_text.LEVELS[1])[0]
    with pytest.raises(ValueError, match="does not have 500 different questions"):
        database.questions(500, True, random.Random(0))


def test_the_files_are_what_the_script_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: None)
    make_databases.main(tmp_path)
    for name in (folder + name for folder in ("", "wide/") for name in ("tables.json", "dev.json", "rows.json")):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()
    schemas, rows = load_schemas(DATA / "tables.json"), json.loads((DATA / "rows.json").read_text())
    connections = {name: build_database(schema, rows[name]) for name, schema in schemas.items()}
    for question in load_questions(DATA / "dev.json", schemas)[::40]:
        run_query(question.query, connections[question.db_id])


# --- the base's text ---


@pytest.fixture(scope="module")
def tokenizer():
    return sql_text.sql_tokenizer()


def test_the_vocabulary_is_small_and_knows_every_word(tokenizer):
    assert len(tokenizer) <= 512
    unknown = tokenizer.backend.token_to_id("<unk>")
    schemas = load_schemas(DATA / "tables.json")
    for question in load_questions(DATA / "dev.json", schemas)[::7]:
        prompt = sql_prompt(schemas[question.db_id], [question], question.question)
        assert unknown not in tokenizer.encode(prompt) and tokenizer.decode(tokenizer.encode(prompt)) == " ".join(prompt.split())
        assert tokenizer.eos_id not in tokenizer.encode(prompt)[-3:]
        assert tokenizer.encode_answer(question.query)[-1] == tokenizer.eos_id == tokenizer.backend.token_to_id(";")


def test_documents_are_prompts(tokenizer):
    """What the base reads in training is, word for word, what it is asked with."""
    database = drawn(1, "prompt")[0]
    document = sql_text.pairs(database, random.Random(5), 3)
    asked = sql_text.asked(database, random.Random(5), 3)
    prompt = sql_prompt(database.schema, asked[:2], asked[2].question)
    assert " ".join(text for text, _ in document).split() == [*prompt.split(), *asked[2].query.split(), ";"]


def test_all_queries_of_a_document_count_and_nothing_else(tokenizer):
    database = drawn(1, "mask")[0]
    documents = [sql_text.pairs(database, random.Random(i), n) for i, n in enumerate((2, 4))]
    prompts, labels = sql_text.as_batch(tokenizer, documents)
    assert prompts.shape == (2, 1) and labels.tokens.shape == labels.mask.shape
    for document, first, tokens, mask in zip(documents, prompts, labels.tokens, labels.mask):
        queries = [text for text, counts in document if counts]
        assert all(query.startswith("select") and query.endswith(" ;") for query in queries)
        assert tokenizer.decode(tokens[mask].tolist()) == " ".join(queries)
        words = " ".join(text for text, _ in document).split()
        assert tokenizer.decode([*first.tolist(), *tokens[: len(words) - 1].tolist()]).split() == words


def test_batches_are_of_one_kind_and_copying_comes_first(tokenizer):
    def kinds(level: int) -> Counter:
        found = Counter()
        for i in range(200):
            documents = sql_text.draw_documents(random.Random(f"{level}/{i}"), level, 1)
            first = documents[0][0][0].split()
            kind = ("queries" if first[0] == "Question:" else "inputs" if first[0] == "Input:" else
                    "pairs" if first[-1] == ")" and len(documents[0]) == 19 else "blocks")
            found[kind] += 1
        return found
    first, second, third, later = map(kinds, (0, 1, 2, 4))
    assert first["blocks"] > 130 and first["pairs"] > 20 and first["inputs"] + first["queries"] < 5
    assert second["queries"] > 150 and second["blocks"] > 5 and second["pairs"] + second["inputs"] < 5
    assert third["blocks"] > 1 and third["queries"] > 30 and third["pairs"] > 100 and third["inputs"] < 5
    assert later["blocks"] > 1 and later["queries"] > 10 and later["inputs"] > 1 and later["pairs"] > 120


def test_repeated_blocks_repeat(tokenizer):
    for i in range(20):
        (block, counts), *rest = sql_text.blocks(random.Random(i))
        assert not counts and all(piece == (block, True) for piece in rest)
        assert 4 <= len(block.split()) <= 12 and 52 < len(block.split()) * (1 + len(rest)) <= 64


def test_queries_without_a_schema_are_pairs_without_it():
    level = sql_text.LEVELS[1]
    for seed in range(5):
        queries = sql_text.document("queries", random.Random(seed), 1)
        schema, *others = sql_text.document("pairs", random.Random(seed), 1)
        assert queries == others and len(queries) == 2 * sql_text.DOCUMENT and not schema[1]
        assert {text.split()[1] for text, counts in queries if counts} <= {*world.TEXTS, *world.NUMBERS}
    assert level.columns == 2 and level.names == len(world.TEXTS), "a guess is seldom right"


class Knows(nn.Module):
    """It says every answer, or with `wrong` always the next token."""

    def __init__(self, size: int, wrong: int = 0):
        super().__init__()
        self.size, self.wrong, self.weight = size, wrong, nn.Parameter(torch.zeros(1))

    def forward(self, prompts, answers):
        return F.one_hot((answers + self.wrong) % self.size, self.size).float()


def test_learnt_counts_whole_last_queries_that_examples_cover(tokenizer):
    size = len(tokenizer)
    for level in (0, 1, 3):
        assert sql_text.learnt(Knows(size), tokenizer, level, 10) == 100
        assert sql_text.learnt(Knows(size, 1), tokenizer, level, 10) == 0
    for document in sql_text.judged(4, 10):
        *before, (question, _), (query, counts) = document
        assert counts and query.startswith("select") and not any(counts for _, counts in before)
        said = {word for text, _ in before for word in text.split()}
        assert all(word in said for word in question.split() if word in world.NONSENSE)
    assert [sql_text.next_level(2, percents) for percents in ([96.9], [97.0], [1.0] * 2, [1.0] * 3)] == [2, 3, 2, 3]
    assert [sql_text.next_level(level, [1.0] * 9) for level in (0, 1)] == [0, 1]
    assert sql_text.next_level(0, [97.0]) == 1 and sql_text.next_level(1, [97.0]) == 2
    assert sql_text.next_level(len(sql_text.LEVELS) - 1, [100.0]) == len(sql_text.LEVELS) - 1
    pieces = (len(sql_text.LEVELS) - 3) * sql_text.TRIES  # after as many the hardest level follows the first two in any case
    assert pieces <= bases.PIECES - bases.LAST


def tiny_decoder(tokenizer, seed: int) -> Decoder:
    config = replace(sql_text.sql_model(tokenizer, 0).config, d_model=16, num_layers=1, num_heads=2, num_kv_heads=2,
                     d_kv=8, d_ff=16)
    source = {**config.source, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 2, "intermediate_size": 16}
    return initialise(Decoder(replace(config, source=source)), seed)


def test_the_loss_falls(tokenizer):
    settings = FitSettings(lr=1e-2, batch_size=2, loss="hard", optimiser="muon", precision="fp32")
    history = fit(tiny_decoder(tokenizer, 0), sql_text.SqlText(tokenizer, 2, 60, 2, 0), settings)
    assert history[0] > 3 and history[-1] < history[0] - 0.5


# --- training it ---


def run(out: Path) -> RunFolder:
    settings = bases.PocketSettings(base="sql", steps=120, batch=2, held_out=2, save_every=0.0, precision="fp32")
    train("pocket", bases.Pocket, settings, [0], out, CPU)
    return RunFolder(out, CPU)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: None)
    monkeypatch.setattr(bases, "PIECES", 3), monkeypatch.setattr(bases, "LAST", 1)
    monkeypatch.setitem(bases.BASES, "sql", replace(bases.BASES["sql"], start=tiny_decoder))
    grades = iter([])
    monkeypatch.setattr(bases, "learnt", lambda model, tokenizer, level, n: next(grades))
    return lambda *percent: monkeypatch.setattr(bases, "learnt", lambda *how, found=iter(percent): next(found))


def test_a_level_begins_when_the_last_is_learnt_and_a_stopped_run_goes_on_exactly(small, tmp_path, capsys, monkeypatch):
    small(98.0, 50.0)
    whole = run(tmp_path / "whole")
    said = capsys.readouterr().out
    assert "piece 0, level 0: 98.0 % right" in said and "piece 1, level 1: 50.0 % right" in said
    assert {f"{n} examples" for n in sql_text.EXAMPLES} <= set(json.loads((tmp_path / "whole/record.json").read_text())["metrics"])

    class Stopped(Exception):
        pass

    small(98.0, 50.0)
    original, calls = sql_text.SqlText.__getitem__, Counter()

    def interrupted(text, step):
        calls[text.level] += 1
        if text.level == 1 and calls[1] == 31:  # in the second piece, after its checkpoint
            raise Stopped
        return original(text, step)
    monkeypatch.setattr(sql_text.SqlText, "__getitem__", interrupted)
    with pytest.raises(Stopped):
        run(tmp_path / "stopped")
    monkeypatch.setattr(sql_text.SqlText, "__getitem__", original)
    small(50.0)
    stopped = run(tmp_path / "stopped")
    for ours, theirs in zip(whole.get("base").parameters(), stopped.get("base").parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_base_is_saved_as_a_llama_that_ends_with_a_semicolon(tokenizer, tmp_path):
    save(tiny_decoder(tokenizer, 0), tokenizer, tmp_path / "base")
    model, read = load(tmp_path / "base")
    assert model.config.eos_token_id == tokenizer.eos_id == read.eos_id and not read.ends_prompts
    text = "Question: largest dwop SQL:"
    assert read.encode(text) == tokenizer.encode(text) and len(read.encode(text)) == 4
    assert json.loads((tmp_path / "base/config.json").read_text())["model_type"] == "llama"


@pytest.fixture(scope="module")
def base():
    folder = ROOT / "data" / "pocket-sql"
    if not (folder / "model.safetensors").exists():
        pytest.skip("data/pocket-sql holds no checkpoint; `python train.py --task pocket --base sql --publish` makes it")
    return load(folder)


def test_the_base_learns_from_its_prompt(base, tokenizer):
    model, read = base
    assert sum(file.stat().st_size for file in (ROOT / "data" / "pocket-sql").iterdir()) <= 10 * 2**20
    assert read.backend.get_vocab() == tokenizer.backend.get_vocab()
    percent = sql_text.held_out_queries(model, read, 40)
    assert percent["0 examples"] <= 10 and percent["8 examples"] >= 60
