"""A slice of bench/damage.py: some trials of each kind, and that it sees a fault where there is one."""

import random
import sys
from contextlib import nullcontext

import pytest
from test_frame import read

from bench import damage, trials
from bench.tables import FAULTS, TABLES
from minicd.tasks.folder import RunFolder

TRIALS = {kind: 2 if kind == "killed" else 4 for kind in damage.KINDS}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("damage")


@pytest.fixture(scope="module")
def sounds(place) -> dict[str, trials.Sound]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv)
        return {task: damage.make_sound(task, place) for task in trials.SMALL}


@pytest.mark.parametrize("kind, number", [(kind, i) for kind, n in TRIALS.items() for i in range(n)])
def test_no_trial_ends_in_a_fault(kind, number, place, sounds, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    said = damage.KINDS[kind][2](place, sounds, random.Random(f"test {kind} {number}"))
    assert said.verdict not in FAULTS, said.words


def test_a_change_that_nobody_checks_is_seen_as_a_fault(place, sounds, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    trial = trials.Trial(sounds["addition"], sounds["addition"].finished, place / "trial")
    path = place / "trial" / "test_after.json"
    path.write_text(path.read_text().replace("accuracy", "accuracy", 1).replace(": ", ":  ", 1))
    monkeypatch.setattr(RunFolder, "check", lambda self, stage: None)
    assert trial.verdict([path]).verdict == "silent"
    trial = trials.Trial(sounds["addition"], sounds["addition"].finished, place / "trial")
    (place / "trial" / "test_after.json").unlink()
    assert trial.verdict([]).verdict == "lost"


def test_how_a_command_ends():
    def end(error):
        def main():
            raise error
        return trials.ask(main)
    assert end(ValueError("a sentence")).verdict == "refused" and end(ValueError("a\nb")).verdict == "traceback"
    assert end(KeyError("x")).verdict == "traceback" and "KeyError" in end(KeyError("x")).words
    assert end(trials.Hang()).verdict == "hang" and trials.ask(lambda: None).verdict == "same"


def test_a_record_with_its_table(place, sounds, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["damage.py", "--kinds", "damaged task", "--trials", "3", "--out", str(tmp_path / "x.json")])
    monkeypatch.setattr(damage, "make_sound", lambda task, where: sounds[task])
    monkeypatch.setattr(damage.tempfile, "TemporaryDirectory", lambda: nullcontext(str(place)))
    damage.main()
    record = read(tmp_path / "x.json")
    assert [row["trials"] for row in record["results"]] == [3] and record["settings"] == {"seed": 0}
    assert "| a task file | 3 |" in TABLES["bench-damage"][1](record)
