"""bench/practice.py: who writes, who teaches, which labels; on a tiny model, and the table of its record."""

import json
import sys
from collections import Counter
from copy import deepcopy

import numpy as np
import pytest
import torch

from bench import practice as bench
from bench.tables import TABLES
from data.world.lists import pocket_tokenizer
from minicd.distill import PracticeSettings
from minicd.hf.checkpoint import save
from minicd.t5 import T5, T5Config, initialise


@pytest.fixture(scope="module")
def base():
    tokenizer = pocket_tokenizer()
    model = T5(T5Config(vocab_size=tokenizer.backend.get_vocab_size(), d_model=16, d_kv=8, num_heads=2, d_ff=32,
                        num_layers=1, num_decoder_layers=1))
    initialise(model, 0)
    return model, tokenizer


def batches(base, way, steps=6):
    model, tokenizer = base
    student, spent = deepcopy(model), Counter()
    teacher = {"base": model, "live": student, "average": deepcopy(model)}[way.teacher]
    how = PracticeSettings(way.labels, label_top=bench.TOP, max_new_tokens=5)
    context = bench.counted(bench.make_context("instance-specific", []), tokenizer, spent)
    return student, spent, bench.Written(way, spent, student, teacher, tokenizer, context, how, steps=steps, batch_size=4)


def test_rules_and_references():
    assert bench.reference("shared rule", "a b c d") == "d c b a"
    texts = bench.lists(100, np.random.default_rng(0))
    assert {bench.rule_of("instance-specific", text) for text in texts} == set(bench.RULES)
    context = bench.make_context("instance-specific", texts[:50])
    assert not set(context.inputs(1000, np.random.default_rng(0))) & set(texts[:50])
    assert context.teacher(texts[0]) == f"{bench.rule_of('instance-specific', texts[0])} : {texts[0]}"


def test_a_label_of_the_student_names_its_own_likeliest_tokens_with_the_probabilities_of_the_teacher(base, monkeypatch):
    monkeypatch.setattr(bench, "TOP", 3)
    student, _, written = batches(base, bench.Way("reverse", "top", 1.0, top_of="student"))
    with torch.no_grad():
        student.decoder.norm.weight.copy_(torch.randn(16))
    logits, prompts, answers = torch.randn(2, student.config.vocab_size), [[5, 6, 7]], [[8, 9]]
    labels = written.soft_labels(logits, prompts, answers, None)
    [own] = bench.score(student, prompts, answers)
    ids = labels.ids.values.view(2, 3).long()
    assert torch.equal(ids, own.topk(3).indices)
    torch.testing.assert_close(labels.weights.view(2, 3), logits.softmax(-1).gather(-1, ids))


def test_an_average_follows_the_student_and_a_live_teacher_is_the_student(base):
    student, _, written = batches(base, bench.Way("reverse", "exact", 1.0, "average"))
    with torch.no_grad():
        [parameter.add_(1.0) for parameter in student.parameters()]
    before = [parameter.clone() for parameter in written.teacher.parameters()]
    written[0]
    for old, now in zip(before, written.teacher.parameters()):
        torch.testing.assert_close(now, old + (1 - bench.DECAY))
    student, _, written = batches(base, bench.Way("reverse", "exact", 1.0, "live"))
    assert written.teacher is student


def test_a_mixture_has_its_share(base, monkeypatch):
    _, _, written = batches(base, bench.Way("exact", "exact", 0.5), steps=400)
    monkeypatch.setattr(bench.Written, "__getitem__", lambda self, step: "student")
    who = [bench.Mixed(["teacher"] * 400, written, 0.5)[step] for step in range(400)]
    assert 160 < who.count("student") < 240 and set(who) == {"teacher", "student"}


def test_what_the_teacher_reads_is_counted(base):
    _, spent, written = batches(base, bench.Way("exact", "exact", 1.0))
    _, labels = written[0]
    inputs = written.contexts[0].inputs(4, np.random.default_rng((0, 0)))
    assert spent["answers"] == int(labels.mask.sum())
    assert spent["prompts"] == sum(len(x.split()) + 3 for x in inputs)  # the rule, the colon, the end


def test_the_record_has_a_row_for_each_way_and_context(tmp_path, monkeypatch, base):
    save(*base, tmp_path / "base")
    out = tmp_path / "bench-practice.json"
    monkeypatch.setattr(bench, "HELD_OUT", 8)
    monkeypatch.setattr(bench, "LONGEST", 3)
    monkeypatch.setattr(sys, "argv", ["practice.py", "--model", str(tmp_path / "base"), "--inputs", "8", "--steps", "2",
                                      "--batch-size", "4", "--seeds", "0", "1", "--device", "cpu", "--out", str(out)])
    bench.main()
    section = TABLES["bench-practice"][1](json.loads(out.read_text()))
    for kind in ("shared rule", "instance-specific"):
        for name in ("not trained", *bench.WAYS):
            assert f"\n| {kind} | {name} | " in section
    assert "2 steps with batches of 4, 8 inputs where the teacher writes; 2 seeds, pocket scale" in section
