"""The paper's own recipe, end to end in smoke size: a T5 folder with the real T5 tokenizer, Nye's scratchpads, --scale paper."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from minicd.hf.checkpoint import load, save
from minicd.t5 import T5, T5Config, initialise
from minicd.tasks import addition
from minicd.tasks.parts.addition_questions import answer, draw_questions, teacher_template
from minicd.labels import Examples
from minicd.hf.tokenizers import read_tokenizer
from minicd.runtime.memory import keep_memory
from minicd.training import Epochs, FitSettings, fit

TOKENIZER = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "tokenizers" / "t5" / "tokenizer.json"
SMALL = {"max-digits": 3, "train-questions": 8, "teacher-epochs": 2, "teacher-batch": 4, "direct-epochs": 2, "practice-questions": 40,
         "student-batch": 8, "test-questions": 4, "floor": 0, "label-samples": 10, "precision": "fp32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny T5 with T5's vocabulary which has learned how a scratchpad ends, so that practice finds answers in nearly all of
    its completions."""
    if not TOKENIZER.exists():
        pytest.skip("the real T5 tokenizer is not here (shared/data/tokenizers/t5)")
    tokenizer = read_tokenizer(TOKENIZER)
    model = initialise(T5(T5Config(vocab_size=32128, d_model=32, d_kv=16, d_ff=64, num_heads=2, num_layers=1, dropout_rate=0.0,
                                   feed_forward_proj="gated-gelu", tie_word_embeddings=False)), seed=0)
    questions = draw_questions(800, 3, "train", np.random.default_rng(0))
    examples = Examples.hard(tokenizer.encode_all([teacher_template(q) for q in questions]),
                             tokenizer.encode_answers([f"Final answer: # {answer(q)} #" for q in questions]))
    keep_memory()  # T5's vocabulary makes large tensors
    fit(model, Epochs(examples, 8, 1, seed=0), FitSettings(lr=1e-2, decay=0.5, precision="fp32"))
    path = tmp_path_factory.mktemp("t5")
    save(model, tokenizer, path)
    return path


def test_the_papers_recipe_runs_end_to_end(folder, tmp_path, monkeypatch, capsys):
    flags = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["train.py", "--task", "addition", "--scale", "paper", "--model", str(folder),
                                      "--out", str(tmp_path / "run"), "--jobs", "1", "--device", "cpu", *flags])
    train.main()
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["scale"] == "paper"
    assert record["settings"]["scratchpad"] == "nye" and record["settings"]["optimiser"] == "adamw"
    assert {"teacher", "before", "after", "scratchpad_then_direct", "scratchpad_and_direct"} <= set(record["metrics"])
    assert len(Examples.load(tmp_path / "run" / "practice.safetensors")) > 25  # of 40
    output = capsys.readouterr().out
    assert "Final answer: #" in output and "paper scale" in output
    model, tokenizer = load(tmp_path / "run" / "student")
    assert model.config.vocab_size == 32128 and tokenizer.encode("4 6") == [314, 431, 1]


def test_the_recipe_is_the_papers():
    settings = addition.AdditionSettings(**addition.Addition.SCALES["paper"])
    assert (settings.train_questions, settings.teacher_epochs, settings.teacher_lr, settings.teacher_batch) == (499, 1000, 3e-4, 8)
    assert (settings.practice_questions, settings.label_samples, settings.clip, settings.warmup, settings.decay) == (10_000, 100, 0, 0, 0)
