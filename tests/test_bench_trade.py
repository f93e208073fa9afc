"""bench/trade.py: one practice set, a line for each learning rate and rank; on a tiny model."""

import json
import sys

import pytest
from helpers import tiny_t5

from bench import trade as bench
from bench.tables import TABLES
from minicd.hf.checkpoint import save
from minicd.tasks import own
from minicd.tokenizer import word_tokenizer

CONTEXTS = """
unrelated = ["d c", "c d"]
[contexts.mine]
teacher = "a : {input}"
student = "{input}"
inputs = ["a b", "b a", "c c", "d a", "a a", "b b", "a c", "c a"]
"""


@pytest.fixture
def record(tmp_path, monkeypatch):
    words = word_tokenizer([*"abcd:"])
    save(tiny_t5(len(words)), words, tmp_path / "base")
    (tmp_path / "my.toml").write_text(CONTEXTS)
    monkeypatch.setitem(own.Own.SCALES, "company", dict(
        contexts=str(tmp_path / "my.toml"), model=str(tmp_path / "base"), practice_inputs=8, batch_size=2, max_new_tokens=3,
        label_samples=5, precision="fp32"))
    monkeypatch.setattr(sys, "argv", ["trade.py", "--ranks", "2", "--epochs", "15", "--points", "2", "--device", "cpu",
                                      "--folder", str(tmp_path / "run"), "--out", str(tmp_path / "bench-trade.json")])
    bench.main()
    return json.loads((tmp_path / "bench-trade.json").read_text())


def test_each_student_is_measured_on_its_way(record):
    assert [(row["rank"], row["lr"]) for row in record["results"]] == [
        *((0, lr) for lr in bench.FULL), *((2, lr) for lr in bench.ADAPTED)]
    for row in record["results"]:
        first, last = row["points"]
        assert 30 <= first["step"] < last["step"] == 60
        assert first["forgotten"] > 0 and last["forgotten"] > 0 and first["kl"] != last["kl"]
    section = TABLES["bench-trade"][1](record)
    assert "\n| adapters of rank 2 | 0.0003 | 60 | " in section and "8 practice items, 15 passes, seed 0; " in section
