"""Files in SPIDER's format: a small one of our own, broken ones, and the real ones where they are there."""

import copy
import json
from pathlib import Path

import pytest

from minicd.tasks.parts.spider import Question, load_questions, load_schemas, schema_text

SPIDER = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "spider"
FARM = {"db_id": "farm", "table_names": ["animal", "field"], "table_names_original": ["Animal", "Field"],
        "column_names_original": [[-1, "*"], [0, "ID"], [0, "Kind"], [1, "ID"], [1, "Animal_ID"]],
        "column_types": ["text", "number", "text", "number", "number"], "primary_keys": [1, 3], "foreign_keys": [[4, 1]]}
ASKED = {"db_id": "farm", "question": "Which kinds are there?", "query": "SELECT Kind FROM Animal", "sql": {}}


def written(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def changed(entry: dict, **values) -> dict:
    """The entry with other values; without the keys whose value is None."""
    return {key: value for key, value in (copy.deepcopy(entry) | values).items() if value is not None}


def test_files(tmp_path):
    schemas = load_schemas(written(tmp_path / "tables.json", [FARM, changed(FARM, db_id="farm_2")]))
    assert schemas == {"farm": FARM, "farm_2": changed(FARM, db_id="farm_2")}
    assert load_questions(written(tmp_path / "dev.json", [ASKED]), schemas) == [
        Question("farm", "Which kinds are there?", "SELECT Kind FROM Animal")]
    assert schema_text(FARM) == "Animal ( ID , Kind ) Field ( ID , Animal_ID )"


COLUMNS = FARM["column_names_original"]
BROKEN_TABLES = [
    ("{", "tables.json is not JSON"), ({}, "tables.json: it holds no list"), ([], "tables.json: its list is empty"),
    ([FARM, 3], "entry 1 is no object"), ([FARM, FARM], "entry 1: db_id 'farm' stands twice"),
    *(([changed(FARM, **{key: None})], rf"entry 0\.{key} is missing") for key in FARM if key != "table_names"),
    *(([changed(FARM, **{key: "x"})], rf"entry 0\.{key} is no list") for key in FARM if key not in ("db_id", "table_names")),
    ([changed(FARM, db_id=" ")], r"entry 0\.db_id is empty"), ([changed(FARM, db_id=3)], r"entry 0\.db_id is no string"),
    ([changed(FARM, table_names_original=[])], r"entry 0\.table_names_original is empty"),
    ([changed(FARM, table_names_original=["Animal", "ANIMAL"])], r"entry 0\.table_names_original: 'animal' stands twice"),
    ([changed(FARM, table_names_original=["Animal", ""])], r"entry 0\.table_names_original holds what is no name"),
    ([changed(FARM, table_names_original=["Animal", "Field", "Barn"])], r"column_names_original has no column of table 2"),
    ([changed(FARM, column_names_original=COLUMNS[1:])], r'column_names_original\[0\] is not \[-1, "\*"\]'),
    ([changed(FARM, column_names_original=[*COLUMNS[:4], [2, "x"]])], r"column_names_original\[4\] is in no table"),
    ([changed(FARM, column_names_original=[*COLUMNS[:4], "x"])], r"column_names_original\[4\] is no pair"),
    ([changed(FARM, column_names_original=[*COLUMNS[:4], [1, 3]])], r"column_names_original, table 1 holds what is no name"),
    ([changed(FARM, column_names_original=[*COLUMNS[:4], [1, "id"]])], r"column_names_original, table 1: 'id' stands twice"),
    ([changed(FARM, column_types=["text"])], r"entry 0\.column_types has 1 types for 5 columns"),
    ([changed(FARM, column_types=[1] * 5)], r"entry 0\.column_types holds what is no string"),
    *(([changed(FARM, primary_keys=keys)], r"entry 0\.primary_keys holds") for keys in ([5], [0], ["1"], [True])),
    *(([changed(FARM, foreign_keys=keys)], r"entry 0\.foreign_keys\[0\] holds") for keys in ([3], [[1]], [[1, 9]], [[1, -1]]))]
BROKEN_QUESTIONS = [
    ({}, "dev.json: it holds no list"), ([ASKED, "x"], "entry 1 is no object"),
    *(([changed(ASKED, **{key: None})], rf"entry 0\.{key} is missing") for key in ("db_id", "question", "query")),
    *(([changed(ASKED, **{key: " "})], rf"entry 0\.{key} is empty") for key in ("db_id", "question", "query")),
    ([ASKED, changed(ASKED, db_id="barn")], r"entry 1\.db_id: there is no database 'barn'"),
    ([changed(ASKED, query="SELECT size FROM animal")],
     r"entry 0\.query: 'SELECT size FROM animal' cannot be read: 'size' is no column of its tables"),
    ([changed(ASKED, query="SELECT kind FROM barn")], r"entry 0\.query: .* 'barn' is no table"),
    ([changed(ASKED, query="What?")], r"entry 0\.query: 'What\?' cannot be read")]


@pytest.mark.parametrize("content, problem", BROKEN_TABLES)
def test_broken_tables(tmp_path, content, problem):
    path = written(tmp_path / "tables.json", content)
    with pytest.raises(ValueError, match=problem) as caught:
        load_schemas(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content, problem", BROKEN_QUESTIONS)
def test_broken_questions(tmp_path, content, problem):
    path = written(tmp_path / "dev.json", content)
    with pytest.raises(ValueError, match=problem) as caught:
        load_questions(path, {"farm": FARM})
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match="tables.json cannot be read"):
        load_schemas(tmp_path / "tables.json")


def test_the_real_files():
    if not (SPIDER / "dev.json").exists():
        pytest.skip(f"{SPIDER / 'dev.json'} is not there")
    schemas = load_schemas(SPIDER / "tables.json")
    questions = load_questions(SPIDER / "dev.json", schemas)
    assert len(schemas) == 166 and len(questions) == 1034 and len({question.db_id for question in questions}) == 20
