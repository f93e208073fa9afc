"""Settings check and explain themselves: every option of every task, in Python and on the command line."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import sys
from pathlib import Path

import pytest
import torch

import eval as eval_program
import train as train_program
from minicd.distill import PracticeSettings
from minicd.tasks.parts.natural_instructions import load_folder
from minicd.tasks.record import ROOT
from minicd.tasks.settings import DistillSettings, as_text, beside, check, differences, flag, guarded, option, range_of

TASKS = train_program.TASKS
CLASSES = {kind for task in TASKS.values() for kind in (task.Settings, task.Eval)}
CLASSES = sorted(CLASSES, key=lambda kind: kind.__name__) + [train_program.Flags, eval_program.Flags]
OPTIONS = [pytest.param(kind, field, id=f"{kind.__module__.split('.')[-1]}.{kind.__name__}.{field.name}")
           for kind in CLASSES for field in dataclasses.fields(kind)]


def outside(field) -> list:
    """Numbers just outside the field's range."""
    step, limit = (1 if field.type.endswith("int]") or field.type == "int" else 1e-6), field.metadata
    values = [limit[name] + sign * step for name, sign in (("least", -1), ("most", 1)) if limit[name] is not None]
    return values + [limit[name] for name in ("above", "below") if limit[name] is not None]


def wrong(field) -> list:
    """Values of a wrong type, without a size, or outside the range."""
    number = [math.nan, math.inf, -math.inf, "3", True, [3], *outside(field)]
    return {"int": [*number, 1.5, 10**15, -(10**15)], "float": number, "str": [3, True, ["a"], b"a"], "bool": [1, "yes", 0.0],
            "list[int]": [3, *([value] for value in (math.nan, "3", 1.5, True, None, *outside(field)))]}[
        field.type.removesuffix(" | None")] + [None] * (not field.type.endswith(" | None"))


@pytest.mark.parametrize("kind, field", OPTIONS)
def test_a_value_that_cannot_be_is_named_by_its_flag(kind, field):
    for value in wrong(field) + ["no such choice"] * bool(field.metadata["choices"]):
        with pytest.raises(ValueError, match=f"^{flag(field)} ") as error:
            check(kind(**{field.name: value}))
        said = str(error.value)
        assert len(said.splitlines()) == 1 and ("it must be" in said or "choose from" in said)


@pytest.mark.parametrize("kind, field", OPTIONS)
def test_the_ends_of_the_range_are_allowed(kind, field):
    limit, whole = field.metadata, not field.type.startswith("float")
    ends = [limit[name] for name in ("least", "most") if limit[name] is not None]
    ends += [limit[name] + sign * 1e-6 for name, sign in (("above", 1), ("below", -1)) if limit[name] is not None]
    for value in ends:
        value = int(value) if whole else value
        check(kind(**{field.name: [value] if field.type.startswith("list") else value}))
    assert limit["help"] and limit["help"] == limit["help"].strip()


@pytest.mark.parametrize("task", TASKS)
def test_defaults_and_presets_are_settings_of_their_task(task):
    check(TASKS[task].Settings()), check(TASKS[task].Eval())
    for preset in TASKS[task].SCALES.values():
        settings = TASKS[task].Settings(**preset)
        assert TASKS[task].SCALES[settings.scale] == preset
        check(TASKS[task].Settings(**(preset | TASKS[task].QUICK)))


def test_ranges_in_words():
    words = {"least": None, "most": None, "above": None, "below": None}
    assert range_of(words) == ""
    assert range_of({**words, "least": 1, "most": 18}) == "at least 1 and at most 18"
    assert range_of({**words, "above": 0, "below": 1}) == "more than 0 and less than 1"
    assert range_of({**words, "above": 0, "most": 1e6}) == "more than 0 and at most 1e+06"


@pytest.fixture
def help_of(monkeypatch, capsys):
    """Flag → its line in --help, on a terminal so wide that no line is broken."""
    def run(program: str, task: str) -> dict[str, str]:
        monkeypatch.setenv("COLUMNS", "1000")
        monkeypatch.setattr(sys, "argv", [f"{program}.py", "--task", task, "--help"])
        with pytest.raises(SystemExit) as stopped:
            importlib.import_module(program).main()
        assert stopped.value.code == 0
        said = re.sub(r"\n {3,}(?=\S)", " ", capsys.readouterr().out)
        return {line.split()[0]: " ".join(line.split()) for line in said.splitlines() if line.startswith("  --")}
    return run


@pytest.mark.parametrize("program", ["train", "eval"])
@pytest.mark.parametrize("task", TASKS)
def test_help_lists_the_settings_of_the_task_and_no_others(help_of, program, task):
    flags = importlib.import_module(program).Flags
    settings = TASKS[task].Settings if program == "train" else TASKS[task].Eval
    fields, said = [*dataclasses.fields(flags), *dataclasses.fields(settings)], help_of(program, task)
    assert list(said) == [flag(field) for field in fields]
    for field, line in zip(fields, said.values()):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        assert field.metadata["help"] in line and range_of(field.metadata) in line
        usual = None if default is None or default is False or default == "" else as_text(default)
        said_usual = re.search(r"default: (.*?)\)$", line)
        assert (said_usual and said_usual[1]) == (usual and f"{usual} {field.metadata['unit']}".strip()), line


def test_help_has_the_defaults_of_its_own_task(help_of):
    explanations, instructions = help_of("train", "explanations"), help_of("train", "instructions")
    assert explanations["--tasks"].endswith("(at least 3; default: 24 tasks)")
    assert explanations["--practice-inputs"].endswith("(at least 1; default: 512 inputs)")
    assert "--shots" not in explanations and "--shots" in instructions
    assert instructions["--tasks"].endswith("default: 10 tasks)")
    assert instructions["--practice-inputs"].endswith("default: 2048 inputs)")
    addition, pocket = help_of("train", "addition"), help_of("train", "pocket")
    assert addition["--optimiser"].endswith("(default: muon)")
    assert instructions["--optimiser"].endswith("(default: adamw)")
    assert "--on-policy" in instructions and "--on-policy" not in addition and "--loss" not in pocket
    assert "--step-by-step" in help_of("eval", "addition") and "--chosen" in help_of("eval", "task_ids")
    assert not {"--step-by-step", "--chosen"} & set(help_of("eval", "instructions"))


@pytest.mark.parametrize("kind", CLASSES)
def test_nothing_is_trained_for_no_time_or_for_ever(kind):
    """Every epoch is long enough for a step, every whole number small enough to count to."""
    for field in dataclasses.fields(kind):
        for value in [1e-9, 1e300] if "epochs" in field.name and field.type == "float" else []:
            with pytest.raises(ValueError, match=f"^{flag(field)} .*: it must be at least 0.001 and at most 1e"):
                check(kind(**{field.name: value}))


@dataclasses.dataclass
class Example:
    """Settings for the tests below."""

    size: int = option(3, "how many", least=0)
    rate: float = option(0.5, "how fast", above=0, below=1)
    whole: bool = option(False, "all of it")
    parts: list[int] = option(lambda: [1, 2], "which", least=1)
    name: str | None = option(None, "what it is called")


def test_an_option_of_ones_own():
    for given, sentence in (({"size": -1}, "--size -1: it must be at least 0"),
                            ({"rate": 1.0}, "--rate 1.0: it must be more than 0 and less than 1"),
                            ({"parts": [3, 0]}, "--parts 0: it must be at least 1"),
                            ({"whole": 1}, "--whole 1: it must be of type bool"),
                            ({"name": 7}, "--name 7: it must be of type str")):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            check(Example(**given))
    check(Example())


def test_differences_name_what_differs_and_nothing_else():
    assert differences(Example()) == [] == differences(Example(parts=[1, 2]))
    assert differences(Example(rate=0.25, whole=True)) == ["--rate 0.25", "--whole"]
    assert differences(Example(parts=[4, 5, 6], name="x")) == ["--parts 4 5 6", "--name x"]
    assert differences(Example(size=4), {"size": 4}) == []
    assert differences(Example(size=4), {"size": 5}, {"size": 4}) == []  # the later preset counts
    assert differences(Example(), {"size": 5, "rate": 2.0}) == ["--size 3", "--rate 0.5"]


def test_differences_of_an_experiment_are_those_to_its_scale():
    for task in TASKS.values():
        for preset in task.SCALES.values():
            assert differences(task.Settings(**preset), preset) == []
            quick = preset | task.QUICK
            assert differences(task.Settings(**quick), preset, task.QUICK) == []
            assert set(words.split()[0] for words in differences(task.Settings(**quick), preset)) == {
                flag(name) for name, value in task.QUICK.items() if value != getattr(task.Settings(**preset), name)}


def test_labels_are_as_the_flags_say():
    assert DistillSettings(loss="topk", label_top=7, precision="fp32").practice_settings(3) == PracticeSettings(
        labels="top", label_samples=100, label_top=7, max_new_tokens=3, precision="fp32")
    assert DistillSettings(label_samples=5).practice_settings(3) == PracticeSettings(
        labels="sampled", label_samples=5, label_top=16, max_new_tokens=3, precision="auto")


def no_run(*arguments, **how):
    raise AssertionError("this has to be refused")


@pytest.mark.parametrize("words, sentence", [
    (["--teacher-lr", "nan"], "--teacher-lr nan: it must be more than 0"),
    (["--clip", "inf"], "--clip inf: it must be at least 0"),
    (["--label-top", "9" * 400], "--label-top 999"), (["--jobs", "-1"], "--jobs -1: it must be at least 0"),
    (["--seeds", "0", "99999999999999999999"], "--seeds 99999999999999999999: it must be at least 0 and at most"),
    (["--practice-questions", str(10**15)], "--practice-questions 1000000000000000: it must be at least 1 and at most 1e+08"),
    (["--teacher-batch", str(10**15)], "--teacher-batch 1000000000000000: it must be at most 1e+09"),
    (["--out", ""], "--out is empty: it must be the name of a folder"),
    (["--quick", "--publish"], "--publish is for whole runs"), (["--join"], "--join goes with --publish"),
    (["--quick", "--scale", "smollm2"], "--quick is for --scale pocket")])
def test_what_is_typed_is_checked(monkeypatch, tmp_path, words, sentence):
    monkeypatch.setattr(sys, "argv", ["train.py", "--task", "addition", "--out", str(tmp_path / "run"), *words])
    monkeypatch.setattr(train_program, "train", no_run)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        train_program.main()
    assert not (tmp_path / "run").exists()


def test_what_belongs_to_the_repository_is_found_from_elsewhere(tmp_path, monkeypatch):
    """Else data/pocket would be asked for at the hub, where anybody could have that name."""
    monkeypatch.chdir(tmp_path)
    assert beside("data/pocket") == str(ROOT / "data/pocket") and beside("mine/model") == "mine/model"
    (tmp_path / "data" / "pocket").mkdir(parents=True)
    assert beside("data/pocket") == "data/pocket"  # what is here comes first
    assert load_folder(Path(beside("data/instructions/test")))


def test_test_inputs_end_where_practice_begins():
    """The first hundred instances of a task are for tests; what comes after them is practised."""
    for task in ("instructions", "explanations", "task_ids"):
        for kind in (TASKS[task].Settings, TASKS[task].Eval):
            with pytest.raises(ValueError, match="^--test-instances 101: it must be at least 1 and at most 100$"):
                check(kind(test_instances=101))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 10 PB")])
def test_where_memory_ends_the_program_says_so(error):
    def main() -> None:
        raise error
    with pytest.raises(SystemExit, match="^error: memory ran out; smaller batches need less"):
        guarded(main)
    with pytest.raises(RuntimeError, match="another"):
        guarded(lambda: (_ for _ in ()).throw(RuntimeError("another")))


@pytest.mark.parametrize("program, words, sentence", [
    ("practice", ["--steps", "0"], "argument --steps: 0 is not between 1 and 1e+09"), ("parity", ["--seed", "-1"], "argument --seed: -1 is not"),
    ("labels", ["--seeds", "99999999999"], "argument --seeds: 99999999999 is not"), ("train", ["--rounds", "0"], "--rounds: 0 is not"),
    ("train", ["--temperature", "nan"], "--temperature: nan is not"), ("sampling", ["--batch", "1" * 30], "argument --batch: 111")])
def test_flags_of_the_benchmarks(monkeypatch, program, words, sentence):
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *words])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"bench.{program}").main()
    assert sentence in str(stopped.value.code) and len(stopped.value.code.splitlines()) == 1


@pytest.mark.parametrize("words, folder", [
    (["--task", "addition"], "runs/addition"), (["--task", "addition", "--scale", "pocket"], "runs/addition"),
    (["--task", "addition", "--quick"], "runs/addition-quick"), (["--task", "own", "--scale", "place"], "runs/own-place"),
    (["--task", "addition", "--scale", "smollm2"], "runs/addition-smollm2"), (["--task", "sql", "--out", "x/y"], "x/y")])
def test_every_scale_has_a_run_folder_of_its_own(words, folder, monkeypatch):
    """So that README's commands can follow one another."""
    seen = []
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--device", "cpu"])
    monkeypatch.setattr(train_program, "train", lambda *arguments, **how: seen.append(arguments[4]))
    train_program.main()
    assert seen == [Path(folder)]
