"""Task files in the format of Natural Instructions v2, and the prompts made from them."""

from __future__ import annotations

import json
import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Container, Sequence


@dataclass(frozen=True)
class Example:
    """An example of a task's prompt. A negative one shows an output that is wrong."""

    input: str
    output: str
    explanation: str


@dataclass(frozen=True)
class Instance:
    """A question with every output that counts as right."""

    id: str
    input: str
    outputs: list[str]


@dataclass(frozen=True)
class NITask:
    """One task file. Its name is the file's, without .json; of its definitions it has the first."""

    name: str
    definition: str
    positives: list[Example]
    negatives: list[Example]
    instances: list[Instance]
    categories: list[str]


def instruction_prompt(task: NITask, text: str, positives: int = 2, negatives: int = 2,
                       explanations: bool = True, periods: bool = False) -> str:
    """T_t: the definition, the first examples of both kinds, as far as the file has them, and the input."""
    return lay_out(task.definition, task.positives[:positives], task.negatives[:negatives], explanations,
                   text, periods)


def lay_out(definition: str, positives: Sequence[Example], negatives: Sequence[Example], explanations: bool,
            text: str, periods: bool = False) -> str:
    """The prompt of TK-Instruct. `periods`: end each part with one, as in its training; ours has none."""
    def close(part: str) -> str:
        part = part.strip()
        return part + "." if periods and part[-1:] not in string.punctuation else part

    lines = ["Definition: " + close(definition)]
    for kind, examples in (("Positive", positives), ("Negative", negatives)):
        for number, example in enumerate(examples, 1):
            lines += ["", f"{kind} Example {number} -",
                      "Input: " + close(example.input), "Output: " + close(example.output)]
            lines += ["Explanation: " + close(example.explanation)] * explanations
    return "\n".join([*lines, "", "Now complete the following example -", "Input: " + close(text), "Output:"])


def inputs_prompt(inputs: Sequence[str]) -> str:
    """A prompt after which a model writes one more input like these, for a D that is the model itself.

    Each stands on one line, with \\n where it has another, so that an input ends where the line does.
    """
    lines = (text.replace("\n", "\\n") for text in inputs)
    return "\n".join([*(f"Input: {line}" for line in lines), "Input:"])


def read_input(line: str) -> str:
    """What a model wrote after `inputs_prompt`."""
    return line.replace("\\n", "\n").strip()


def official_tests(folder: Path) -> set[str] | None:
    """The names of the test tasks, where the repository's list of them stands beside its folder of tasks."""
    path = Path(folder).parent / "splits" / "default" / "test_tasks.txt"
    return set(path.read_text(encoding="utf-8").split()) if path.is_file() else None


def load_folder(folder: Path, names: Container[str] | None = None) -> list[NITask]:
    """The task files of a folder, by name, or those with these names.

    Raises ValueError where there is none, one is unusable, or two clash.
    """
    paths = [path for path in sorted(Path(folder).glob("*.json")) if names is None or path.stem in names]
    if not paths:
        raise ValueError(f"{folder} holds no task file (*.json); those of Natural Instructions are in the "
                         "folder tasks of github.com/allenai/natural-instructions: --data")
    names: dict[str, Path] = {}
    ids: dict[str, Path] = {}
    tasks = []
    for path in paths:
        tasks.append(load_task(path))
        clash = names.setdefault(path.stem.lower(), path)
        if clash != path:
            raise ValueError(f"{path} and {clash} name the same task")
        for instance in tasks[-1].instances:
            if ids.setdefault(instance.id, path) != path:
                raise ValueError(f"{path}: Instances: the id {instance.id!r} is also in {ids[instance.id]}")
    return tasks


def find_tasks(folder: Path, beginnings: str, more_than: int = 0) -> list[NITask]:
    """The tasks whose file names begin like this: "task1,task22". Each needs more than `more_than` instances.

    Raises ValueError where a beginning names no file or several, and for fewer than two different tasks.
    """
    tasks = []
    for beginning in filter(None, beginnings.split(",")):
        beginning = beginning.strip()
        found = [path for path in sorted(Path(folder).glob("*.json")) if path.name.startswith(beginning)]
        if len(found) != 1:
            raise ValueError(f"{folder}: {len(found)} task files begin with {beginning!r}; one is needed")
        tasks.append(load_task(found[0]))
    if len({task.name for task in tasks}) < max(2, len(tasks)):
        raise ValueError("--chosen needs two different tasks or more, with commas between them")
    if not all(len(task.instances) > more_than for task in tasks):
        raise ValueError(f"every task needs more than {more_than} instances: "
                         f"the first {more_than} are for tests")
    return tasks


def load_task(path: Path) -> NITask:
    """Read one task file. Where it is unusable, raises ValueError with the names of file and key."""
    path = Path(path)
    if not re.fullmatch(r"\w[\w.+-]*", path.stem):  # the task's name becomes a folder's
        raise ValueError(f"{path.parent}: {path.name!r} is no name for a task file: a name begins with a "
                         "letter or a digit, and has only these and . _ + -")
    if path.exists() and not path.is_file():  # a pipe would never end
        raise ValueError(f"{path} cannot be read: it is no regular file")
    try:
        return read_task(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_task(path: Path) -> NITask:
    try:
        data = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=keys_once)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    check(isinstance(data, dict), "a task file is a JSON object")
    instances = [read_instance(item, f"Instances[{i}]") for i, item in enumerate(listed(data, "Instances"))]
    seen: set[str] = set()
    for instance in instances:
        check(instance.id not in seen, f"Instances: the id {instance.id!r} stands twice")
        seen.add(instance.id)
    return NITask(path.stem, texts(data, "Definition")[0], read_examples(data, "Positive Examples"),
                  read_examples(data, "Negative Examples"), instances, texts(data, "Categories"))


def keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    for key in result:
        check(sum(key == other for other, _ in pairs) == 1, f"the key {key!r} stands twice in one object")
    return result


def read_examples(data: dict, key: str) -> list[Example]:
    return [Example(*(text(item, field, f"{key}[{i}]") for field in ("input", "output", "explanation")))
            for i, item in enumerate(listed(data, key, least=0))]


def read_instance(item: Any, where: str) -> Instance:
    return Instance(text(item, "id", where), text(item, "input", where), texts(item, "output", where + "."))


def text(item: Any, key: str, where: str) -> str:
    """The string under a key of an object inside a list. An explanation may be empty, nothing else may."""
    check(isinstance(item, dict), f"{where} is no object")
    check(key in item, f"{where}.{key} is missing")
    check(isinstance(item[key], str), f"{where}.{key} is no string")
    check(key == "explanation" or bool(item[key].strip()), f"{where}.{key} is empty")
    return item[key]


def texts(data: dict, key: str, where: str = "") -> list[str]:
    found = listed(data, key, where=where)
    for item in found:
        check(isinstance(item, str), f"{where}{key} holds something that is no string")
        check(bool(item.strip()), f"{where}{key} holds an empty string")
    return found


def listed(data: dict, key: str, least: int = 1, where: str = "") -> list:
    check(key in data, f"{where}{key} is missing")
    check(isinstance(data[key], list), f"{where}{key} is no list")
    check(len(data[key]) >= least, f"{where}{key} is empty")
    return data[key]


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
