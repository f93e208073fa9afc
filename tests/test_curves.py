"""The curves of addition: points, their training, and how they are shown."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from data.world.lists import pocket_tokenizer
from helpers import tiny_t5
from minicd.hf.checkpoint import save
from minicd.labels import Examples, Ragged, SoftLabels
from minicd.losses import empirical
from minicd.tasks import curves
from minicd.tasks.addition import direct_examples
from minicd.tasks.parts.addition_questions import draw_questions
from minicd.tasks.curves import Curves, CurveSettings
from minicd.tasks.folder import RunFolder
from minicd.tasks.run import train

SMALL = dict(max_digits=3, train_questions=40, teacher_epochs=2, teacher_batch=8, practice_questions=80, student_epochs=2.0,
             student_batch=8, test_questions=30, floor=0.0, labelled=[20, 40], budgets=[20, 80], precision="fp32", optimiser="adamw")


def practised(n: int = 80) -> Examples:
    tokenizer = pocket_tokenizer()
    questions = draw_questions(n, 3, "practice", np.random.default_rng(0), unique=False)
    items = direct_examples(questions, tokenizer, "compact")
    return dataclasses.replace(items, inputs=Ragged.of_texts(questions))


@pytest.fixture
def run(tmp_path):
    """Curves of a tiny model, whose teacher and practice are there already. → the record"""
    tokenizer = pocket_tokenizer()
    save(tiny_t5(len(tokenizer)), tokenizer, tmp_path / "base")

    def make(**changes) -> dict:
        settings = CurveSettings(model=str(tmp_path / "base"), **(SMALL | changes))
        folder = RunFolder(tmp_path / "run", torch.device("cpu"))
        folder.claim(settings)
        for stage, made in {"teacher": tiny_t5(len(tokenizer), seed=1), "teacher_validation": {"accuracy": 50.0},
                            "practice": practised(), "practice_figures": {"shown": ""}}.items():
            folder.keep(stage, made, tokenizer)
        train("curves", Curves, settings, [0], tmp_path / "run", torch.device("cpu"))
        return json.loads((tmp_path / "run" / "record.json").read_text())
    return make


def test_every_point_is_a_model_of_its_own_with_the_same_number_of_steps(run, tmp_path, monkeypatch):
    fitted = {}
    original = Curves.fit_copy

    def fit_copy(self, start, examples, settings, epochs, stage):
        fitted[stage] = start.state_dict()["shared.weight"][0, 0].item(), len(examples), settings, epochs
        return original(self, start, examples, settings, epochs, stage)
    monkeypatch.setattr(Curves, "fit_copy", fit_copy)
    record = run(other_base=str(tmp_path / "base"), lines="teacher,student,hard,direct_teacher,direct_base")
    points = [f"{line}-{n}" for line in ("teacher", "student", "hard", "direct_teacher", "direct_base", "other_base")
              for n in ((20, 40) if line in ("teacher", "other_base") else (20, 80))]
    assert list(record["metrics"]) == points == list(fitted)
    for stage, (weight, size, settings, epochs) in fitted.items():
        assert size == int(stage.split("-")[1])
        assert round(epochs * (size // 8)) == (2 * (40 // 8) if stage.startswith(("teacher", "other_base")) else 2 * (80 // 8))
        started = "teacher" if stage.startswith(("student", "hard", "direct_teacher")) else "base"
        assert weight == tiny_t5(len(pocket_tokenizer()), seed=int(started == "teacher")).shared.weight[0, 0].item()
        assert settings.loss == ("empirical" if stage.startswith("student") else "hard")


def test_hard_labels_are_the_teachers_answers_not_the_true_ones(run, monkeypatch):
    """And a rerun in the same folder may ask for another curve."""
    run(lines="student")
    fitted, original = {}, Curves.fit_copy

    def fit_copy(self, start, examples, settings, epochs, stage):
        fitted[stage] = examples
        return original(self, start, examples, settings, epochs, stage)
    monkeypatch.setattr(Curves, "fit_copy", fit_copy)
    by_teacher = practised()
    monkeypatch.setattr(Curves, "true_answers", lambda self, items: dataclasses.replace(
        items, answers=Ragged.of([[1]] * len(items)), labels=SoftLabels.one_hot(torch.ones(len(items), dtype=torch.int32))))
    record = run(lines="student,hard,direct_teacher", budgets=[80])
    assert list(record["metrics"]) == ["student-80", "hard-80", "direct_teacher-80"]
    assert Curves.headline(record).startswith("80 → 80 questions: student ")
    assert list(fitted) == ["hard-80", "direct_teacher-80"]  # the student is there already
    assert [fitted["hard-80"].answers[i] for i in range(80)] == [by_teacher.answers[i] for i in range(80)]
    assert fitted["direct_teacher-80"].answers[0] == [1]


def test_the_table_has_a_row_for_each_curve(run):
    record = run()
    text = Curves.table(record)
    assert "| N | 20 | 40 |" in text and "| N | 20 | 80 |" in text
    assert text.count("from the base") == 1 and "other base" not in text
    assert "The teacher of all practice solves 50.0 % of 500 others" in text
    assert Curves.headline(record).count(" → ") == 6 and "20 → 80 questions: student " in Curves.headline(record)


def test_the_picture_is_drawn(run, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    run()
    assert (tmp_path / "run" / "curves-pocket.png").stat().st_size > 10_000


def test_the_first_items_are_those_of_practice():
    items = practised(10)
    soft = SoftLabels.sample(torch.randn(len(items.answers.values), 9), 7)
    items = dataclasses.replace(items, labels=soft)
    some = curves.first(items, 4)
    assert [some.prompts[i] for i in range(len(some))] == [items.prompts[i] for i in range(4)]
    assert [some.input(i) for i in range(4)] == [items.input(i) for i in range(4)]
    (prompts, labels), (again, expected) = (part.batch(torch.arange(4)) for part in (some, items))
    assert torch.equal(prompts, again) and torch.equal(labels.tokens, expected.tokens) and torch.equal(labels.mask, expected.mask)
    logits = torch.randn(*labels.tokens.shape, 80)
    assert torch.equal(empirical(logits, labels)[labels.mask], empirical(logits, expected)[labels.mask])


@pytest.mark.parametrize("changes, sentence", [
    ({"lines": "teacher,tutor"}, "--lines tutor: choose from teacher, other_base"),
    ({"lines": "other_base"}, "--lines other_base needs that base: --other-base FOLDER"),
    ({"budgets": [0]}, "--budgets 0: it must be at least 1")])
def test_curves_that_cannot_be(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        CurveSettings(**changes)


@pytest.mark.parametrize("line", ["student", "hard", "direct_teacher", "direct_base"])
def test_what_trains_on_practice_waits_for_it(line, tmp_path):
    """True answers, too, are those of practised questions."""
    made = Curves(CurveSettings(lines=line, budgets=[499]), 0, RunFolder(tmp_path, torch.device("cpu")))
    assert [stage.needs for stage in made.stages() if stage.name == f"{line}-499"] == [("practice",)]


def test_a_point_of_one_question(run):
    assert list(run(lines="student", budgets=[1])["metrics"]) == ["student-1"]


def test_more_questions_than_there_are(run):
    with pytest.raises(ValueError, match="--budgets 100: there are only 80 --practice-questions"):
        run(budgets=[20, 100])
