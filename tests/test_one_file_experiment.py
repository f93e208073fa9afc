"""An experiment of one file through the frame: seeds side by side, run folder, resume, record, table."""

import json
from pathlib import Path

import pytest
import torch
from one_file_experiment import Reverse, ReverseSettings

from minicd.runtime.files import write_checked
from minicd.tasks.run import train

BASE = Path(__file__).resolve().parent.parent / "data" / "pocket"
CPU = torch.device("cpu")


def run(out: Path, capsys, **how) -> tuple[dict, str]:
    settings = ReverseSettings(model=str(BASE), items=600, tests=30)
    train("reverse", Reverse, settings, [0, 1], out, CPU, **how)
    return json.loads((out / "record.json").read_text()), capsys.readouterr().out


def times(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix == ".safetensors"}


def test_it_runs_resumes_and_shows_its_table(tmp_path, capsys):
    record, said = run(tmp_path / "run", capsys, jobs=2)
    assert record["seeds"] == [0, 1] and set(record["metrics"]) == {"teacher", "before", "after"}
    assert {"practice", "student", "scores", "total", "wall"} <= set(record["minutes"]) and record["hardware"]
    mean = {row: metric["mean"] for row, metric in record["metrics"].items()}
    assert mean["teacher"] > 80 > 20 > mean["before"] and mean["after"] > mean["before"] + 20
    assert record["metrics"]["after"]["std"] is not None and record["settings"]["items"] == 600
    assert "One practice item" in said and "Lists reversed, %, 2 seeds, pocket scale" in said and "| teacher | " in said

    before = times(tmp_path / "run")
    again, _ = run(tmp_path / "run", capsys)
    assert again["metrics"] == record["metrics"] and times(tmp_path / "run") == before  # nothing is made anew

    (tmp_path / "run" / "scores.json").unlink()
    third, _ = run(tmp_path / "run", capsys)
    assert third["metrics"] == record["metrics"] and times(tmp_path / "run") == before


def test_other_settings_want_another_folder(tmp_path, capsys):
    (tmp_path / "scores.json").write_text("{}")
    write_checked(tmp_path / "settings.json", {"items": 7})
    with pytest.raises(ValueError, match="holds a run with other settings: .*items .there 7, now 600."):
        run(tmp_path, capsys)
