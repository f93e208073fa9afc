"""bench/labels.py: its figures against what is known by hand, and the table of them."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import labels as bench
from bench.tables import TABLES
from minicd.labels import SoftLabels

CPU = torch.device("cpu")


def test_the_peak_is_what_is_held_at_once():
    """1 MB stays while 2 MB come and go, and again 2 MB: never more than 3 MB."""
    def call():
        kept = torch.zeros(10**6, dtype=torch.uint8)
        for _ in range(2):
            torch.zeros(2 * 10**6, dtype=torch.uint8)
        return kept
    assert bench.cpu_peak(call) == 3 * 10**6


def test_bytes_of_a_label():
    """A top-2 label is two ids and two weights of 4 bytes, and where they start, of 8; one number more ends the last."""
    assert bench.stored(SoftLabels.top(torch.randn(4, 10), 2)) == 2 * (4 + 4) + 8 + 8 / 4


def test_every_loss_and_the_dense_ones_have_a_cost():
    teacher, student = bench.draw(50, torch.Generator().manual_seed(0))
    made = {"sampled": SoftLabels.sample(teacher, 100), "top": SoftLabels.top(teacher, 16), "exact": SoftLabels.top(teacher)}
    found = bench.costs(teacher, student, made, SimpleNamespace(device=CPU, rounds=1, cpu_time=False))
    assert set(found) == {"dense KL", "dense CE", *bench.LOSSES} and all(row["copies"] > 1 for row in found.values())


def test_dense_and_exact_are_the_same_loss():
    teacher, student = bench.draw(50, torch.Generator().manual_seed(0))
    z, tokens = student.view(*bench.SHAPE, -1), torch.zeros(bench.SHAPE, dtype=torch.long)
    (dense, _), (exact, _) = bench.dense("dense KL", teacher), bench.sparse("exact", {"exact": SoftLabels.top(teacher)}, tokens)
    assert dense(z).item() == pytest.approx(exact(z).item(), abs=1e-5)


def test_errors_of_the_gradient():
    """The whole distribution makes none, more tokens make less, and samples make what theory expects."""
    found = bench.errors(300, 0, CPU)
    assert found["exact", 0]["whole"] < 1e-4
    assert found["top", 1]["whole"] > found["top", 4]["whole"] > found["top", 16]["whole"] > found["exact", 0]["whole"]
    for n in bench.SAMPLES:
        assert found["sampled", n]["whole"] == pytest.approx(found["sampled", n]["expected_whole"], rel=0.25)


def test_the_record_has_what_its_table_shows(tmp_path, monkeypatch):
    out = tmp_path / "bench-labels.json"
    monkeypatch.setattr(sys, "argv", ["labels.py", "--vocabulary", "60", "--rounds", "1", "--device", "cpu", "--out", str(out)])
    monkeypatch.setattr(bench, "plot", lambda results, path: False)
    bench.main()
    section = TABLES["bench-labels"][1](json.loads(out.read_text()))
    assert "100 samples" in section and "empirical" in section and ".png" not in section
