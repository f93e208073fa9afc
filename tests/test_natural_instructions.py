"""Task files in Natural Instructions' format: the real ones, the pocket ones, malformed ones, and the prompts made of them."""

import copy
import json
import os
import threading
from pathlib import Path

import pytest

from minicd.tasks.parts.natural_instructions import Example, find_tasks, instruction_prompt, lay_out, load_folder, load_task

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data" / "natural_instructions" / "tasks"
POCKET = [ROOT / "data" / "instructions" / part for part in ("train", "test")]

TASK = {
    "Contributors": ["A B"], "Source": ["s"], "URL": ["u"], "Categories": ["Counting", "Other"], "Reasoning": [],
    "Definition": ["Count the words.", "Say how many words there are."], "Input_language": ["English"],
    "Output_language": ["English"], "Instruction_language": ["English"], "Domains": ["Words"],
    "Positive Examples": [{"input": "a b", "output": "2", "explanation": "There are two."},
                          {"input": "a", "output": "1", "explanation": ""}],
    "Negative Examples": [{"input": "a b c", "output": "2", "explanation": "There are three"}],
    "Instances": [{"id": "one", "input": "x y", "output": ["2", "two"]}, {"id": "two", "input": "x", "output": ["1"]}],
    "Instance License": ["MIT"]}


def written(folder: Path, content, name: str = "task1_count.json") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def changed(*keys, to=None) -> dict:
    """TASK with what stands under these keys replaced, or removed."""
    task = copy.deepcopy(TASK)
    place = task
    for key in keys[:-1]:
        place = place[key]
    if to is None:
        del place[keys[-1]]
    else:
        place[keys[-1]] = to
    return task


def test_a_task(tmp_path):
    task = load_task(written(tmp_path, TASK))
    assert task.name == "task1_count" and task.definition == "Count the words." and task.categories == ["Counting", "Other"]
    assert task.positives == [Example("a b", "2", "There are two."), Example("a", "1", "")]
    assert task.negatives == [Example("a b c", "2", "There are three")]
    assert [(i.id, i.input, i.outputs) for i in task.instances] == [("one", "x y", ["2", "two"]), ("two", "x", ["1"])]


def test_the_prompt(tmp_path):
    task = load_task(written(tmp_path, TASK))
    assert instruction_prompt(task, "q r") == (
        "Definition: Count the words.\n\nPositive Example 1 -\nInput: a b\nOutput: 2\nExplanation: There are two.\n\n"
        "Positive Example 2 -\nInput: a\nOutput: 1\nExplanation: \n\nNegative Example 1 -\nInput: a b c\nOutput: 2\n"
        "Explanation: There are three\n\nNow complete the following example -\nInput: q r\nOutput:")
    assert instruction_prompt(task, "q?", 1, 0, explanations=False, periods=True) == (
        "Definition: Count the words.\n\nPositive Example 1 -\nInput: a b.\nOutput: 2.\n\n"
        "Now complete the following example -\nInput: q?\nOutput:")
    assert instruction_prompt(task, "q", 0, 0).count("Example") == 0


def test_the_prompt_of_parts():
    assert lay_out(" d \n", [], [], True, " x ") == "Definition: d\n\nNow complete the following example -\nInput: x\nOutput:"
    prompt = lay_out("d", [], [], True, "x!", periods=True)
    assert prompt == "Definition: d.\n\nNow complete the following example -\nInput: x!\nOutput:"


MALFORMED = [
    (changed("Definition"), "Definition is missing"), (changed("Instances"), "Instances is missing"),
    (changed("Categories"), "Categories is missing"), (changed("Positive Examples"), "Positive Examples is missing"),
    (changed("Negative Examples"), "Negative Examples is missing"), (changed("Instances", to=[]), "Instances is empty"),
    (changed("Instances", to={"a": 1}), "Instances is no list"), (changed("Definition", to="Count."), "Definition is no list"),
    (changed("Definition", to=[]), "Definition is empty"), (changed("Definition", to=[1]), "Definition holds something"),
    (changed("Definition", to=["  "]), "Definition holds an empty string"),
    (changed("Categories", to=7), "Categories is no list"), (changed("Instances", 1, to="x"), r"Instances\[1\] is no object"),
    (changed("Instances", 0, "id"), r"Instances\[0\].id is missing"),
    (changed("Instances", 0, "id", to=5), r"Instances\[0\].id is no string"),
    (changed("Instances", 0, "input", to=""), r"Instances\[0\].input is empty"),
    (changed("Instances", 0, "output"), r"Instances\[0\].output is missing"),
    (changed("Instances", 0, "output", to="2"), r"Instances\[0\].output is no list"),
    (changed("Instances", 0, "output", to=[]), r"Instances\[0\].output is empty"),
    (changed("Instances", 0, "output", to=[2]), r"Instances\[0\].output holds something"),
    (changed("Instances", 1, "id", to="one"), "Instances: the id 'one' stands twice"),
    (changed("Positive Examples", 0, "explanation"), r"Positive Examples\[0\].explanation is missing"),
    (changed("Negative Examples", 0, "output", to=["2"]), r"Negative Examples\[0\].output is no string"),
    (changed("Positive Examples", 1, to=["a"]), r"Positive Examples\[1\] is no object"),
    ([], "a JSON object"), ("", "not JSON"), ("{", "not JSON"), ("[" * 100_000, "not JSON"), ("\0\x07", "not JSON"),
    (json.dumps(TASK)[:-1] + ', "Definition": ["x"]}', "'Definition' stands twice")]


@pytest.mark.parametrize("content, message", MALFORMED)
def test_malformed_files_are_refused_in_one_sentence(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=message) as error:
        load_task(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match=f"{path} cannot be read"):
            load_task(path)
    (tmp_path / "latin.json").write_bytes('{"ä": 1}'.encode("latin-1"))
    with pytest.raises(ValueError, match="latin.json: not JSON"):
        load_task(tmp_path / "latin.json")


@pytest.mark.parametrize("name", ["...json", "..json", ".json", "-x.json", "a b.json", "a\x1b[2J.json", "a\nb.json", "..\\a.json"])
def test_a_name_that_could_be_no_folder_is_refused(tmp_path, name):
    """The task's name becomes a folder of the run, and stands in its tables; `..` would be outside."""
    path = written(tmp_path, TASK, name)
    for call in (lambda: load_task(path), lambda: find_tasks(tmp_path, name)):
        with pytest.raises(ValueError, match="is no name for a task file") as error:
            call()
        assert str(error.value).isprintable() and repr(name) in str(error.value)
    if list(tmp_path.glob("*.json")):
        with pytest.raises(ValueError, match="is no name for a task file"):
            load_folder(tmp_path)


def test_usual_names_are_names(tmp_path):
    for name in ("task1393_superglue-copa.v2", "Task_1", "1", "\u00e4"):
        assert load_task(written(tmp_path, TASK, f"{name}.json")).name == name


def test_a_pipe_is_no_task_file(tmp_path):
    """Which must not be waited for, so this does not wait either."""
    os.mkfifo(tmp_path / "task1.json")
    said = []

    def attempt(call, *given) -> None:
        try:
            call(*given)
        except ValueError as error:
            said.append(str(error))
    calls = ((load_task, tmp_path / "task1.json"), (load_folder, tmp_path), (find_tasks, tmp_path, "task1"))
    threads = [threading.Thread(target=attempt, args=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert said == [f"{tmp_path / 'task1.json'} cannot be read: it is no regular file"] * 3


def test_folders(tmp_path):
    with pytest.raises(ValueError, match="holds no task file"):
        load_folder(tmp_path)
    written(tmp_path, TASK)
    assert [task.name for task in load_folder(tmp_path)] == ["task1_count"]
    other = changed("Instances", to=[{"id": "two", "input": "z", "output": ["1"]}])
    written(tmp_path, other, "task2_other.json")
    with pytest.raises(ValueError, match="task2_other.json: Instances: the id 'two' is also in .*task1_count.json"):
        load_folder(tmp_path)
    other["Instances"][0]["id"] = "three"
    written(tmp_path, other, "task2_other.json")
    assert [task.name for task in load_folder(tmp_path)] == ["task1_count", "task2_other"]
    if not (tmp_path / "TASK1_COUNT.json").exists():  # where file names do not depend on case there is nothing to clash
        written(tmp_path, changed("Instances", to=[{"id": "four", "input": "z", "output": ["1"]}]), "Task1_count.json")
        with pytest.raises(ValueError, match="name the same task"):
            load_folder(tmp_path)




@pytest.fixture(scope="module")
def real_files():
    if not REAL.exists():
        pytest.skip(f"{REAL} is not there")
    return {path: json.loads(path.read_text()) for path in sorted(REAL.glob("*.json"))}


def test_the_real_files_load(real_files):
    tasks = load_folder(REAL)
    assert len(tasks) == len(real_files) == 51
    for task, data in zip(tasks, real_files.values()):
        assert [i.input for i in task.instances] == [i["input"] for i in data["Instances"]]
        prompt = instruction_prompt(task, task.instances[0].input, periods=True)
        assert prompt.startswith("Definition: " + data["Definition"][0].strip()) and prompt.count("Positive Example") == 2


def test_pocket_files_have_the_keys_and_types_of_real_ones(real_files):
    sample = next(iter(real_files.values()))
    for path in (path for folder in POCKET for path in folder.glob("*.json")):
        data = json.loads(path.read_text())
        assert list(data) == list(sample)
        for key, value in data.items():
            assert isinstance(value, list) and {type(item) for item in value} <= {type(item) for item in sample[key] or ["a"]}
        assert {frozenset(item) for item in data["Instances"]} == {frozenset(sample["Instances"][0])}
        for examples in ("Positive Examples", "Negative Examples"):
            assert {frozenset(item) for item in data[examples]} == {frozenset(sample[examples][0])}


@pytest.mark.parametrize("folder, least, instances", [(POCKET[0], 100, 20), (POCKET[1], 30, 200)])
def test_the_pocket_files_load(folder, least, instances):
    tasks = load_folder(folder)
    assert len(tasks) >= least
    for task in tasks:
        assert len(task.instances) == instances and len(task.positives) == len(task.negatives) == 3
        inputs = [instance.input for instance in task.instances] + [e.input for e in task.positives + task.negatives]
        assert len(set(inputs)) == len(inputs)
