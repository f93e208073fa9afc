"""The curve of validation KL in `--task own`, and the weights of its best step, however often the run is stopped."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_t5

from minicd.distill import Context, PracticeSettings, identity
from minicd.rounds import RoundSettings, rounds
from minicd.tasks import own
from minicd.tasks.parts import own_curve, own_measures
from minicd.tasks.parts.own_curve import Curve, Validation
from minicd.tokenizer import word_tokenizer
from minicd.training import FitSettings

WORDS = word_tokenizer([*"abcdefgh", "one", "two"])
ONE, TWO = (Context(lambda n, rng: list(rng.choice([*"abcdefgh"], n)), lambda x, t=t: f"{t} {x}", lambda x: x, identity)
            for t in ("one", "two"))
SETTINGS = RoundSettings(PracticeSettings(max_new_tokens=3, label_samples=5), FitSettings(lr=1e-2, batch_size=2),
                         items=40, epochs=3, save_every=0)  # 60 steps
BASE = tiny_t5(len(WORDS), seed=4)


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Wave:
    """A made-up validation: the KL goes up and down with the weights."""

    def __init__(self, stop: int = 0):
        self.stop, self.seen = stop, []

    def __call__(self, model) -> dict[str, float]:
        learnt = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        self.seen.append(float(1 + (50 * learnt).sum().sin()))
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt
        return {"one": self.seen[-1]}


def distilled(folder, stop: int = 0, best: bool = True, rank: int = 0, schedule=((ONE,), (TWO,))):
    curve = Curve(Wave(stop), folder, [["one"]] * len(schedule), 20, best)
    settings = replace(SETTINGS, fit=replace(SETTINGS.fit, lora_rank=rank))
    return rounds(BASE, WORDS, schedule, settings, seed=2, folder=folder, evaluate=curve), curve


def test_a_round_ends_with_the_weights_of_its_best_step(tmp_path):
    best, curve = distilled(tmp_path / "best", schedule=[[ONE]])
    last, same = distilled(tmp_path / "last", best=False, schedule=[[ONE]])
    points = curve.points(0)
    assert [point["step"] for point in points] == [20, 40, 60] and points == same.points(0), "the same training"
    assert curve.validation(best)["one"] == min(point["kl"]["one"] for point in points)
    assert curve.validation(last)["one"] == points[-1]["kl"]["one"]
    assert not (tmp_path / "last" / "round-0" / "best.safetensors").exists()
    assert curve.lines({"one": 7.0})["one"] == [[0, 7.0], *([point["step"], point["kl"]["one"]] for point in points)]


@pytest.mark.parametrize("rank", [0, 2])
def test_stopped_at_any_point_it_ends_the_same(tmp_path, rank):
    whole, curve = distilled(tmp_path / "whole", rank=rank)
    for stop in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            distilled(tmp_path / str(stop), stop, rank=rank)
        torch.rand(stop)
        again, resumed = distilled(tmp_path / str(stop), rank=rank)
        assert torch.equal(weights(again), weights(whole)), "resume is exact"
        assert [resumed.points(i) for i in (0, 1)] == [curve.points(i) for i in (0, 1)]
        assert len(resumed.validation.seen) == 7 - stop, "points before the last checkpoint are kept"


def test_points_after_the_last_checkpoint_are_made_again(tmp_path):
    whole, curve = distilled(tmp_path, schedule=[[ONE]])
    (tmp_path / "round-0" / "student.safetensors").unlink()
    again, resumed = distilled(tmp_path, schedule=[[ONE]])
    assert torch.equal(weights(again), weights(whole)) and resumed.points(0) == curve.points(0)
    assert len(resumed.validation.seen) == 3


def test_damaged_files_are_named(tmp_path):
    distilled(tmp_path, schedule=[[ONE]])
    (tmp_path / "round-0" / "student.safetensors").unlink()
    for name, damage in (("best.safetensors", 60), ("curve.json", 20)):
        file = tmp_path / "round-0" / name
        content = file.read_bytes()
        file.write_bytes(content[:-damage])
        with pytest.raises(ValueError, match=f"{name} is damaged.*delete it"):
            distilled(tmp_path, schedule=[[ONE]])
        file.write_bytes(content)


def test_validation_is_the_measure_after_training():
    """The teacher answers once; along its answers the KL is that of `along_teacher`."""
    how, student = SimpleNamespace(max_new_tokens=3, precision="fp32"), tiny_t5(len(WORDS), seed=5)
    texts = [*"abcd"]
    found = Validation(BASE, WORDS, {"one": (ONE, texts), "none": (TWO, [])}, how)(student)
    answers = own_measures.teacher_answers(BASE, WORDS, ONE, texts, how)
    assert {*found} == {"one"} and found["one"] == pytest.approx(
        own_measures.along_teacher(BASE, student, WORDS, ONE, texts, answers, how)["kl"][0])


def test_no_more_inputs_than_memory_holds(monkeypatch):
    how = SimpleNamespace(max_new_tokens=3, precision="fp32")
    monkeypatch.setattr(own_curve, "AT_ONCE", 2 * 3 * BASE.config.vocab_size)
    assert len(Validation(BASE, WORDS, {"one": (ONE, [*"abcd"])}, how).rows["one"][0]) == 2


def test_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    assert own_curve.plot({"one": [[0, 9.0], [20, 3.5]]}, tmp_path / "x.png", "title")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert not own_curve.plot({}, tmp_path / "y.png", "title") and not (tmp_path / "y.png").exists()


def test_stopping_at_the_best_needs_a_curve_and_inputs(tmp_path):
    with pytest.raises(ValueError, match="--stop-at-best needs the curve"):
        own.OwnSettings(stop_at_best=True, curve_every=0)
    (tmp_path / "my.toml").write_text('[contexts.mine]\nteacher = "reverse : {input}"\ninputs = ["a b", "b a", "c a"]')
    experiment = own.Own(own.OwnSettings(contexts=str(tmp_path / "my.toml"), stop_at_best=True), 0, SimpleNamespace(
        device=torch.device("cpu"), path=tmp_path, get=lambda stage: {"texts": {"mine": ["a b", "b a", "c a"]}}))
    with pytest.raises(ValueError, match="--stop-at-best: mine: no validation input has an answer"):
        experiment.curve(tmp_path)
