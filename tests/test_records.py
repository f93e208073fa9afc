"""Every command of a record makes that record: it is understood, with the same settings, seeds and name."""

import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import train as train_program
from minicd.tasks.settings import guarded

ROOT = Path(__file__).resolve().parent.parent
RECORDS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("*.json"))}
TRAINED = [name for name, record in RECORDS.items() if "train.py" in record["command"]]
RENAMED = {"batch": "batch_size"}  # in older records


@pytest.mark.parametrize("name", TRAINED)
def test_the_command_of_a_record_has_its_settings(name, monkeypatch, tmp_path):
    record, made, seeds = RECORDS[name], {}, []

    def remember(task, kind, settings, seeds, out, device, **more):
        made.update(task=task, kind=kind, settings=vars(settings), seeds=seeds, **more)
    monkeypatch.setattr(train_program, "train", remember)
    for command in record["command"].split("; "):  # of seeds that joined
        monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
        guarded(train_program.main)
        seeds += made["seeds"]
        assert made["publish"]
    for key, value in record["settings"].items():
        key = key if key in made["settings"] else RENAMED.get(key, key)
        if key in made["settings"]:  # some are no settings any more
            assert made["settings"][key] == value, key
    scale = made["kind"].record_scale(SimpleNamespace(**made["settings"]))
    assert f"{made['task']}-{scale}" == name and sorted(seeds) == sorted(record["seeds"])


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_says_where_it_comes_from(name):
    record = RECORDS[name]
    assert record["command"].startswith("python ") and "/tmp" not in record["command"] and record["hardware"]
    assert "+" not in record["commit"], "made from files that no commit holds"
