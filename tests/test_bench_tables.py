"""bench/tables.py: small records by hand, and whatever records results/ holds."""

import json
from pathlib import Path

import pytest

from bench.tables import TABLES

RESULTS = Path(__file__).resolve().parent.parent / "results"
HEAD = {"hardware": "a machine", "torch": "2.0", "commit": "abc", "command": "python -m bench.x", "seeds": [0, 1]}


def spread(mean: float) -> dict:
    return {"values": [mean, mean], "mean": mean, "std": 0.25}


def lines(name: str, **record) -> list[str]:
    return TABLES[name][1](HEAD | record).splitlines()


@pytest.mark.parametrize("name", TABLES)
def test_a_record_of_today_has_a_table(name):
    path = RESULTS / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not there")
    record = json.loads(path.read_text())
    text = TABLES[name][1](record)
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1 and record["commit"] in text and record["command"] in text
    if name not in ("bench-labels", "bench-parts", "bench-practice", "bench-trade", "bench-damage"):  # not a row for each result
        assert text.count("\n|") == len(record["results"]) + 1


def test_speeds():
    row = {"median": {"minicd": 1234.5, "transformers": 999.6}, "ratio": 1.235}
    how = {"settings": {"rounds": 5}, "transformers": "5.0"}
    table = lines("bench-train", results=[row | {"what": "questions/s"}], **how)
    assert table[2:] == ["| questions/s | 1,234 | 1,000 | 1.24 |", "",
                         "(Median of 5 alternating rounds, a machine, PyTorch 2.0, transformers 5.0, commit abc, "
                         "`python -m bench.x`.)"]
    case = {"shape": "tiny", "precision": "fp32", "batch": 64, "new": 32}
    rows = [row | case | {"prompt": 16, "stop": False}, row | case | {"prompt": [20, 200], "stop": True}]
    table = lines("bench-sampling", results=rows, **how)
    assert table[2:4] == ["| tiny | fp32 | 64 | 16 → 32 | 1,234 | 1,000 | 1.24 |",
                          "| tiny | fp32 | 64 | 20–200 → up to 32 | 1,234 | 1,000 | 1.24 |"]


def test_costs_of_labels():
    losses = {"dense KL": {"peak_mib": 500, "ms": 30}, "hard": {"peak_mib": 100, "ms": 60}}
    results = [{"vocabulary": 32128, "model": "T5", "losses": losses,
                "bytes": {"dense": 1200.0, "sampled": 100.0, "top": 120.0, "exact": 2400.0}}]
    table = lines("bench-labels", results=results, settings={"samples": 100, "top": 16})
    assert table[0] == "| times less than dense | vocabulary 32,128 T5 |"
    assert table[2:7] == ["| label of a token in the file: 100 samples | 12× (100 bytes) |",
                          "| label of a token in the file: top-16 | 10× (120 bytes) |",
                          "| label of a token in the file: exact | 0.50× (2,400 bytes) |",
                          "| loss and gradient: dense KL | 1.0× (500 MiB), 1.0× (30 ms) |",
                          "| loss and gradient: hard | 5.0× (100 MiB), 0.50× (60 ms) |"]


def test_parity():
    row = {"family": "gpt2", "configurations": 20, "absolute": 5.72e-6, "relative": 3.5e-6, "saved": 0.0,
           "completions": 80, "equal": 79, "ties": 1, "mismatches": 0}
    table = lines("bench-parity", results=[row], settings={"tolerance": 1e-4})
    assert table[2] == "| gpt2 | 20 | 5.7e-06 | 3.5e-06 | 0 | 79 of 80 | 1 | 0 |"
    assert "tolerance 1e-04" in table[-1]


def test_damage():
    row = {"kind": "a", "what": "a file", "trials": 9, "refused": 5, "same": 3, "another valid file": 1, "traceback": 0, "silent": 0,
           "lost": 0, "hang": 0}
    table = lines("bench-damage", results=[row, row | {"what": "a kill", "hang": 2}], settings={"seed": 7})
    assert table[2:5] == ["| a file | 9 | 5 | 3 | 1 | 0 | 0 | 0 | 0 |", "| a kill | 9 | 5 | 3 | 1 | 0 | 0 | 0 | 2 |",
                          "| all | 18 | 10 | 6 | 2 | 0 | 0 | 0 | 2 |"]
    assert table[-1] == "(a machine, PyTorch 2.0, commit abc, `python -m bench.x`, seed 7.)"
