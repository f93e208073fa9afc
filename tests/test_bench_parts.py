"""bench/parts.py: by parts a loss costs the memory of a part, and its gradients are the same; the table of it."""

import json
import sys

import torch

from bench import parts as bench
from bench.labels import batch, cpu_peak
from bench.tables import TABLES
from minicd.labels import SoftLabels
from minicd.losses import find_loss


def test_the_head_computes_the_same_by_parts_in_a_tenth_of_the_memory(monkeypatch):
    model = bench.Head(5000, 8, 320, torch.Generator().manual_seed(0))
    labels = batch(SoftLabels.top(torch.randn(320, 5000), 4), torch.zeros(10, 32, dtype=torch.long))
    monkeypatch.setattr(bench.lean, "PART", 5000 * 8)
    found = []
    for at_once in (2**62, 0):
        step = lambda: bench.training(model, labels, find_loss("jsd"), at_once)
        step()
        found.append((cpu_peak(step), *(p.grad.clone() for p in model.parameters())))
    (whole, *gradients), (parts, *by_parts) = found
    assert parts < whole / 10
    for one, other in zip(gradients, by_parts, strict=True):
        torch.testing.assert_close(one, other)
    assert bench.lean.LOGITS_AT_ONCE == 2**26


def test_the_record_has_what_its_table_shows(tmp_path, monkeypatch):
    out = tmp_path / "bench-parts.json"
    monkeypatch.setattr(sys, "argv", ["parts.py", "--vocabulary", "3000", "--tokens", "64", "--width", "4", "--rounds", "1",
                                      "--device", "cpu", "--out", str(out)])
    bench.main()
    section = TABLES["bench-parts"][1](json.loads(out.read_text()))
    for name in bench.KINDS:
        assert f"\n| {name} | " in section
    assert "(64 tokens of a vocabulary of 3,000, states of width 4, " in section


def test_in_bf16_the_sum_of_parts_stays_in_fp32():
    model = bench.Head(300, 8, 32, torch.Generator().manual_seed(0))
    labels = batch(SoftLabels.top(torch.randn(32, 300), 4), torch.zeros(1, 32, dtype=torch.long))
    step = lambda at_once: bench.training(model, labels, find_loss("topk"), at_once)
    gradients = []
    for at_once in (2**62, 0):
        with torch.autocast("cpu", torch.bfloat16):
            step(at_once)
        gradients.append(model.tokens.weight.grad.clone())
    assert gradients[1].dtype == torch.float32
    torch.testing.assert_close(*gradients, atol=2e-2 * gradients[0].abs().max().item(), rtol=2e-2)
