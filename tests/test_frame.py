"""The frame's parts by hand: records over seeds, tables, run folders, what is borrowed."""

import json

import pytest
import torch

from minicd.metrics import correlation
from minicd.tasks.folder import RunFolder
from minicd.tasks.record import make_record, mean_of, spread
from minicd.tasks.report import against_paper, fill_regions, minutes_line, pm, table
from minicd.tasks.settings import RunSettings

CPU = torch.device("cpu")


def test_spread_and_mean():
    assert spread([1.0, 3.0]) == {"values": [1.0, 3.0], "mean": 2.0, "std": 1.41}
    assert spread([1.005])["std"] is None
    assert mean_of([{"a": 1.0, "b": [2, 4]}, {"a": 2.0, "b": [4, 4], "c": 5}]) == {"a": 1.5, "b": [3, 4], "c": 5}


def test_a_record_of_two_seeds():
    notes = [{"student": {"minutes": 1.234, "hardware": "a", "commit": "c1", "losses": [2.0, 0.5]}},
             {"student": {"minutes": 2.0, "hardware": "b", "commit": "c1", "losses": [2.0, 0.25]}, "x": {"minutes": 1.0}}]
    figures = [{"metrics": {"after": 90.0}, "points": {"t": [1.0, 2.0]}}, {"metrics": {"after": 92.0}, "points": {"t": [3.0, 4.0]}}]
    record = make_record("mine", RunSettings(), [0, 5], figures, notes, {"after": 95})
    assert record["metrics"]["after"] == {"values": [90.0, 92.0], "mean": 91.0, "std": 1.41}
    assert record["points"] == {"t": [2.0, 3.0]} and record["final_losses"] == {"student": [0.5, 0.25]}
    assert record["minutes"] == {"total": [1.23, 3.0], "student": [1.23, 2.0], "x": [0.0, 1.0]}
    assert record["hardware"] == "a; b" and record["commits"] == "c1" and record["paper"] == {"after": 95}
    assert record["command"].startswith("python") and record["settings"]["scale"] == "pocket"
    assert against_paper(record, {"after": "student", "gone": "no such row"}) == (
        "|  | minicd | paper |\n| --- | ---: | ---: |\n| student | 91.0 ± 1.4 | 95 |")
    assert minutes_line(record) == "minutes a seed: all stages 1.2/3.0, student 1.2/2.0, x 0.0/1.0"


def test_tables_and_regions():
    assert table(["a", "b"], [["x", 1]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
    assert pm({"mean": 1.25, "std": None}, 2) == "1.25"
    text = "one\n<!-- t -->\nold\n<!-- /t -->\n<!-- u -->\nkept\n<!-- /u -->\n"
    assert fill_regions(text, {"t": "new", "u": "", "v": "nowhere"}) == text.replace("old", "new")


def test_a_folder_keeps_gets_and_borrows(tmp_path):
    first, second = RunFolder(tmp_path / "a", CPU), RunFolder(tmp_path / "b", CPU)
    with first.timed("scores/one"):
        first.keep("scores/one", {"x": 1}, None)
    assert first.get("scores/one") == {"x": 1} and first.notes()["scores--one"]["minutes"] >= 0
    with pytest.raises(ValueError, match="no finished stage two"):
        first.get("two")
    second.borrow(first.path, ["scores/one"])
    assert second.get("scores/one") == {"x": 1} and second.notes() == first.notes()
    with pytest.raises(ValueError, match="is missing: there is no finished stage to reuse"):
        second.borrow(first.path, ["two"])
    (tmp_path / "a" / "scores" / "one.json").write_text("{")
    with pytest.raises(ValueError, match="one.json is damaged"):
        first.get("scores/one")


def test_a_folder_belongs_to_its_settings(tmp_path):
    folder = RunFolder(tmp_path, CPU)
    folder.claim(RunSettings())
    folder.claim(RunSettings(precision="fp32"))  # nothing depends on them yet
    folder.keep("x", 1, None)
    folder.claim(RunSettings(precision="fp32", save_every=1.0))  # which changes no result
    with pytest.raises(ValueError, match="precision .there 'fp32', now 'bf16'."):
        folder.claim(RunSettings(precision="bf16"))
    assert json.loads((tmp_path / "settings.json").read_text())["precision"] == "fp32"


def test_correlation():
    r, p = correlation([(0, 0), (1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12), (7, 14)])
    assert r == pytest.approx(1.0) and p < 0.001
    assert correlation([(1, 2), (1, 3), (1, 4)]) == (0.0, 1.0)
    r, p = correlation([(0, 3), (1, 2), (2, 1)])
    assert r == pytest.approx(-1.0) and p > 0.9
