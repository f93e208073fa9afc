"""Rounds of distillation, ensembles of teacher prompts, and on-policy batches, on a random T5 and toy contexts."""

import sys
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import tiny_t5

from minicd import training
from minicd.distill import Context, PracticeSettings, combine_seeds, distill, ensemble_logits, identity, practice
from minicd.losses import LOSSES, forward_kl, mean_over_tokens, reverse_kl
from minicd.rounds import OnPolicy, RoundSettings, rounds
from minicd.runtime.files import atomic_safetensors
from minicd.sampling import generate, score
from minicd.tasks.addition import AdditionSettings
from minicd.tokenizer import word_tokenizer
from minicd.training import FitSettings, fit

# The package has functions of these names.
distill_module, rounds_module = sys.modules["minicd.distill"], sys.modules["minicd.rounds"]
LETTERS = list("abcdefgh")
TOKENIZER = word_tokenizer([*LETTERS, "one", "two", "three", "student", "other"])
PRACTICE = PracticeSettings(max_new_tokens=6)
SETTINGS = RoundSettings(PRACTICE, FitSettings(lr=1e-2, loss="empirical", batch_size=8, precision="fp32"), items=48, epochs=4)
# Enough for a student whose distance from the teacher halves or nearly so, whatever the processor's rounding.
LEARN = RoundSettings(PRACTICE, replace(SETTINGS.fit, lr=5e-3, decay=0.5), items=256, epochs=4)


def letters(n: int, rng: np.random.Generator) -> list[str]:
    return [" ".join(rng.choice(LETTERS, size=3)) for _ in range(n)]


def context(teacher: str, student: str = "student", extract=identity) -> Context:
    return Context(letters, lambda x: f"{teacher} {x}", lambda x: f"{student} {x}", extract)


ONE, TWO, THREE = context("one"), context("two", "other"), context("three")


@pytest.fixture(scope="module")
def base():
    return tiny_t5(len(TOKENIZER), seed=4, initializer_factor=1.5)


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def distance(student, prompt: str, teacher_prompt: str, teacher, loss=forward_kl) -> float:
    """Mean KL(label ‖ student), or another loss, over fresh practice items of this context."""
    settings = PracticeSettings(labels="exact", max_new_tokens=6)
    items = practice(teacher, TOKENIZER, context(teacher_prompt, prompt), 64, settings, seed=99)
    prompts, labels = items.batch(torch.arange(len(items)))
    with torch.no_grad():
        return mean_over_tokens(loss(student(prompts, labels.tokens), labels), labels.mask).item()


def test_a_round_is_practice_and_distillation_of_all_its_contexts_together(base):
    """Equation 2: the items of both contexts are mixed, and one student is fitted to them."""
    before = weights(base)
    student = rounds(base, TOKENIZER, [[ONE, TWO]], LEARN, seed=3)
    assert torch.equal(weights(base), before), "the model that was passed stays as it is"
    for prompt, teacher_prompt in (("student", "one"), ("other", "two")):
        assert distance(student, prompt, teacher_prompt, base) < 0.7 * distance(base, prompt, teacher_prompt, base)


@pytest.mark.parametrize("other", [dict(seed=4), dict(settings=replace(SETTINGS, items=40)), dict(schedule=[[ONE, TWO]])])
def test_a_folder_of_other_rounds_is_refused(base, other, tmp_path):
    short = replace(SETTINGS, epochs=1.0)

    def distilled(schedule=[[ONE]], settings=short, seed=3):
        return rounds(base, TOKENIZER, schedule, settings, seed=seed, folder=tmp_path)
    assert torch.equal(weights(distilled()), weights(distilled()))
    with pytest.raises(ValueError, match="it was trained with other settings, contexts, loss or seed"):
        distilled(**other)


def seen_teachers(monkeypatch) -> list[torch.Tensor]:
    """The weights of the teacher at each call of practice."""
    seen, real = [], rounds_module.practice
    monkeypatch.setattr(rounds_module, "practice", lambda teacher, *rest, **how: (seen.append(weights(teacher)),
                                                                           real(teacher, *rest, **how))[1])
    return seen


def test_sequential_rounds_keep_the_base_as_teacher_and_go_on_from_the_last_student(base, monkeypatch):
    """Equation 3."""
    seen = seen_teachers(monkeypatch)
    two = rounds(base, TOKENIZER, [[ONE], [TWO]], LEARN, seed=3)
    assert all(torch.equal(w, weights(base)) for w in seen) and len(seen) == 2
    first = rounds(base, TOKENIZER, [[ONE]], LEARN, seed=3)
    assert not torch.equal(weights(first), weights(two))
    assert distance(two, "student", "one", base) < 0.7 * distance(base, "student", "one", base)  # from round 1


def test_recursive_rounds_are_taught_by_the_last_student(base, monkeypatch):
    seen = seen_teachers(monkeypatch)
    recursive = rounds(base, TOKENIZER, [[ONE], [TWO]], SETTINGS, recursive=True, seed=3)
    first = rounds(base, TOKENIZER, [[ONE]], SETTINGS, seed=3)
    assert torch.equal(seen[0], weights(base)) and torch.equal(seen[1], weights(first))
    assert not torch.equal(weights(recursive), weights(rounds(base, TOKENIZER, [[ONE], [TWO]], SETTINGS, seed=3)))


def test_a_later_round_overwrites_an_earlier_one(base):
    """The same student prompt, distilled from another teacher prompt: the new one wins (paper, section 3.1)."""
    student = rounds(base, TOKENIZER, [[ONE], [THREE]], LEARN, seed=1)
    before = rounds(base, TOKENIZER, [[ONE]], LEARN, seed=1)
    new, old = (distance(student, "student", word, base) for word in ("three", "one"))
    assert new < distance(before, "student", "three", base) and distance(before, "student", "one", base) < old


@pytest.mark.parametrize("schedule, words", [([], "has no round"), ([[ONE], []], "without a context")])
def test_a_schedule_that_cannot_be_followed(base, schedule, words):
    with pytest.raises(ValueError, match=words):
        rounds(base, TOKENIZER, schedule, SETTINGS)


def test_the_name_precedes_those_of_the_progress_bars(base, monkeypatch):
    seen = []
    for stage in ("practice", "distill"):
        def named(*rest, real=getattr(rounds_module, stage), name, **how):
            seen.append(name)
            return real(*rest, **how)
        monkeypatch.setattr(rounds_module, stage, named)
    rounds(base, TOKENIZER, [[ONE, TWO], [THREE]], SETTINGS, name="sums")
    assert seen == ["sums round 1, practice 1", "sums round 1, practice 2", "sums round 1, distill",
                    "sums round 2, practice 1", "sums round 2, distill"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("recursive", [False, True])
@pytest.mark.parametrize("stage, call", [("practice_chunk", 1), ("practice_chunk", 3), ("fit", 1), ("fit", 2)])
def test_rounds_stopped_anywhere_resume_bit_for_bit(base, tmp_path, monkeypatch, recursive, stage, call):
    """Stopped in the practice or the training of either round. (Inside `fit`, test_training.py looks.)"""
    schedule = [[ONE, TWO], [THREE]]
    expected = weights(rounds(base, TOKENIZER, schedule, SETTINGS, recursive=recursive, seed=3))
    calls, real = [], getattr(distill_module, stage)

    def stopping(*arguments, **how):
        calls.append(1)
        if len(calls) == call:
            raise Stop
        return real(*arguments, **how)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(distill_module, stage, stopping)
        rounds(base, TOKENIZER, schedule, SETTINGS, recursive=recursive, seed=3, folder=tmp_path)
    resumed = rounds(base, TOKENIZER, schedule, SETTINGS, recursive=recursive, seed=3, folder=tmp_path)
    assert torch.equal(weights(resumed), expected)
    monkeypatch.setattr(distill_module, "fit", None)  # a third call has nothing left to do
    once_more = rounds(base, TOKENIZER, schedule, SETTINGS, recursive=recursive, seed=3, folder=tmp_path)
    assert torch.equal(weights(once_more), expected)


def test_a_finished_round_that_is_damaged_or_of_another_model_is_named(base, tmp_path):
    path = tmp_path / "round-0" / "student.safetensors"
    atomic_safetensors(path, tiny_t5(8).state_dict())
    with pytest.raises(ValueError, match="round-0/student.safetensors is damaged or another model's"):
        rounds(base, TOKENIZER, [[ONE]], SETTINGS, folder=tmp_path)
    path.write_bytes(b"12345678")
    with pytest.raises(ValueError, match="delete it to train anew"):
        rounds(base, TOKENIZER, [[ONE]], SETTINGS, folder=tmp_path)


def test_an_ensembles_label_is_the_average_of_its_probabilities(base):
    inputs = letters(5, np.random.default_rng(0))
    views = [TOKENIZER.encode_all([f"{word} {x}" for x in inputs]) for word in ("one", "two", "three")]
    answers = [[3, 4, 5, 6][: 1 + i % 4] for i in range(5)]
    slices = [slice(len(a) // 2, len(a)) for a in answers]
    for i, logits in enumerate(ensemble_logits(base, views, answers, slices)):
        each = [score(base, [view[i]], [answers[i]])[0][slices[i]].softmax(-1) for view in views]
        assert torch.allclose(logits.softmax(-1), torch.stack(each).mean(0), atol=1e-6)
        assert not torch.allclose(logits.softmax(-1), each[0], atol=1e-2)


def test_an_ensemble_practises_under_all_its_prompts(base):
    """Completions come from each of the prompts, and their labels from all."""
    ensemble = Context(letters, [ONE.teacher, TWO.teacher], ONE.student, identity)
    settings = PracticeSettings(max_new_tokens=6, temperature=0)
    both = practice(base, TOKENIZER, ensemble, 40, settings, seed=2)
    greedy = [practice(base, TOKENIZER, c, 40, settings, seed=2) for c in (ONE, context("two"))]
    source = [[both.answers[i] == part.answers[i] for part in greedy] for i in range(40)]
    assert all(map(any, source)) and any(s == [True, False] for s in source) and any(s == [False, True] for s in source)


@pytest.mark.parametrize("labels, entries", [("top", 5), ("exact", 16)])
def test_kinds_of_labels(base, labels, entries):
    items = practice(base, TOKENIZER, ONE, 20, PracticeSettings(labels=labels, label_top=5, max_new_tokens=6), seed=0)
    assert {len(items.labels.ids[m]) for m in range(len(items.answers.values))} == {entries}
    assert items.labels.kind == labels
    assert (items.labels.weights > 0).all() and items.labels.weights.is_floating_point()


def test_an_unknown_kind_of_label():
    with pytest.raises(ValueError, match="labels 'some' are unknown"):
        practice(tiny_t5(len(TOKENIZER)), TOKENIZER, ONE, 4, PracticeSettings(labels="some", max_new_tokens=4))


@pytest.mark.parametrize("loss, labels", [("exact", "exact"), ("topk", "top"), ("reverse", "exact"), ("jsd", "exact")])
def test_every_loss_brings_the_student_to_the_teacher(base, loss, labels):
    items = practice(base, TOKENIZER, ONE, 256, PracticeSettings(labels=labels, max_new_tokens=6), seed=0)
    student = deepcopy(base)
    distill(student, items, replace(LEARN.fit, loss=loss), epochs=6)
    assert distance(student, "student", "one", base, LOSSES[loss]) < 0.7 * distance(base, "student", "one", base, LOSSES[loss])


def on_policy(student, teacher, **how) -> OnPolicy:
    settings = PracticeSettings(labels="exact", max_new_tokens=6)
    return OnPolicy(student, teacher, TOKENIZER, ONE, settings, steps=40, batch_size=8, **how)


def judged(student, teacher, context: Context) -> float:
    """Mean KL(student ‖ teacher) over fresh answers of the student."""
    settings = PracticeSettings(labels="exact", max_new_tokens=6)
    prompts, labels = OnPolicy(student, teacher, TOKENIZER, context, settings, steps=1, batch_size=64, seed=77)[0]
    with torch.no_grad():
        return mean_over_tokens(reverse_kl(student(prompts, labels.tokens), labels), labels.mask).item()


def test_on_policy_answers_are_the_students_and_labels_the_teachers(base):
    student = tiny_t5(len(TOKENIZER), seed=9, initializer_factor=1.5)
    source = on_policy(student, base, seed=3)
    prompts, labels = source[5]
    inputs = letters(8, np.random.default_rng((3, 5)))
    assert prompts.tolist() == TOKENIZER.encode_all([f"student {x}" for x in inputs])
    generator = torch.Generator().manual_seed(combine_seeds((3, 5)))
    written, reasons = generate(student, prompts.tolist(), 6, generator=generator, reasons=True)
    ends = [[TOKENIZER.eos_id] * (why == "eos") for why in reasons]
    assert [row[mask].tolist() for row, mask in zip(labels.tokens, labels.mask)] == [y + end for y, end in zip(written, ends)]
    assert [TOKENIZER.eos_id] in ends and [] in ends
    for i, x in enumerate(inputs):
        answer = labels.tokens[i][labels.mask[i]].tolist()
        expected = score(base, [TOKENIZER.encode(f"one {x}")], [answer])[0].softmax(-1)
        row = torch.zeros(len(answer), len(TOKENIZER)).scatter(-1, labels.ids[i, : len(answer)], labels.weights[i, : len(answer)])
        assert torch.allclose(row, expected, atol=1e-5)
    again = on_policy(student, base, seed=3)[5]
    assert torch.equal(again[1].tokens, labels.tokens)
    assert not torch.equal(on_policy(student, base, seed=4)[5][0], prompts)


def test_on_policy_several_prompts_of_the_teacher_give_their_mean(base):
    two = Context(letters, [lambda x: f"one {x}", lambda x: f"two {x}"], lambda x: f"student {x}", identity)
    settings = PracticeSettings(labels="exact", max_new_tokens=6)
    _, labels = OnPolicy(base, base, TOKENIZER, two, settings, steps=1, batch_size=4, seed=3)[0]
    for i, x in enumerate(letters(4, np.random.default_rng((3, 0)))):
        answer = labels.tokens[i][labels.mask[i]].tolist()
        views = [score(base, [TOKENIZER.encode(f"{name} {x}")], [answer])[0].softmax(-1) for name in ("one", "two")]
        row = torch.zeros(len(answer), len(TOKENIZER)).scatter(-1, labels.ids[i, : len(answer)], labels.weights[i, : len(answer)])
        assert torch.allclose(row, sum(views) / 2, atol=1e-5)


def test_on_policy_training_brings_the_student_to_the_teacher(base):
    student = deepcopy(base)

    fit(student, on_policy(student, base), FitSettings(lr=3e-3, loss="reverse", batch_size=8, precision="fp32"))
    assert judged(student, base, ONE) < 0.6 * judged(base, base, ONE)


def test_on_policy_labels_must_suit_the_loss(base):
    drawn = OnPolicy(base, base, TOKENIZER, ONE, PracticeSettings(max_new_tokens=2), steps=1, batch_size=2)
    with pytest.raises(ValueError, match="the loss 'reverse' needs exact or top-k labels, but these are sampled"):
        fit(deepcopy(base), drawn, FitSettings(loss="reverse", batch_size=2, precision="fp32"))


def test_on_policy_needs_the_identity_extractor(base):
    cutting = context("one", extract=lambda y: slice(0, 1))
    with pytest.raises(ValueError, match="on-policy distillation needs minicd.identity"):
        OnPolicy(base, base, TOKENIZER, cutting, PRACTICE, steps=1, batch_size=1)


ON_POLICY = RoundSettings(PracticeSettings(labels="exact", max_new_tokens=6), replace(SETTINGS.fit, lr=3e-3, loss="reverse"),
                          items=60, epochs=2.0, on_policy=True)


@pytest.mark.parametrize("temperature, prompt, same", [(1.0, "one", True), (0.5, "one", False), (1.0, "two", False)])
def test_an_interrupted_round_on_policy_goes_on_with_its_settings_and_prompts(base, tmp_path, temperature, prompt, same):
    def stop(*where):
        raise KeyboardInterrupt
    settings = replace(ON_POLICY, items=200, epochs=1.0, save_every=0.0, fit=replace(ON_POLICY.fit, batch_size=8))
    with pytest.raises(KeyboardInterrupt):  # at step 20, when the one before is on disk
        rounds(base, TOKENIZER, [[ONE]], settings, folder=tmp_path, evaluate=stop)
    changed = replace(settings, practice=replace(settings.practice, temperature=temperature))
    with nullcontext() if same else pytest.raises(ValueError, match="other settings, data or loss"):
        rounds(base, TOKENIZER, [[replace(ONE, teacher=lambda x: f"{prompt} {x}")]], changed, folder=tmp_path)


def test_on_policy_contexts_take_turns(base):
    settings = PracticeSettings(max_new_tokens=4)
    both = OnPolicy(base, base, TOKENIZER, [ONE, TWO], settings, steps=4, batch_size=3)
    for step, source in enumerate([ONE, TWO, ONE]):
        alone = OnPolicy(base, base, TOKENIZER, source, settings, steps=4, batch_size=3)
        assert torch.equal(both[step][1].ids, alone[step][1].ids)


def test_a_round_on_policy_needs_no_practice_set(base, tmp_path):
    student = rounds(base, TOKENIZER, [[ONE, TWO]], replace(ON_POLICY, epochs=6.0), seed=1, folder=tmp_path)
    assert [path.name for path in (tmp_path / "round-0").iterdir()] == ["student.safetensors"]
    assert all(judged(student, base, each) < 0.6 * judged(base, base, each) for each in (ONE, TWO))


def test_the_judge_of_a_recursive_round_on_policy_is_the_student_as_the_round_found_it(base, monkeypatch):
    first = rounds(base, TOKENIZER, [[ONE]], ON_POLICY, seed=2)
    judges, real = [], rounds_module.ensemble_logits

    def watched(teacher, *arguments):
        judges.append(weights(teacher))
        return real(teacher, *arguments)
    monkeypatch.setattr(rounds_module, "ensemble_logits", watched)
    rounds(base, TOKENIZER, [[ONE], [THREE]], ON_POLICY, recursive=True, seed=2)
    steps = len(judges) // 2
    assert steps == 15 and all(torch.equal(j, weights(base)) for j in judges[:steps])
    assert all(torch.equal(j, weights(first)) for j in judges[steps:])


def test_a_round_on_policy_stopped_between_steps_resumes_bit_for_bit(base, tmp_path, monkeypatch):
    expected = weights(rounds(base, TOKENIZER, [[ONE], [TWO]], ON_POLICY, recursive=True, seed=4))
    real, calls = training.Run.update, []

    def stopping(run, *batch):
        calls.append(1)
        if len(calls) == 28:  # in the second round
            raise Stop
        loss = real(run, *batch)
        run.save()
        return loss
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(training.Run, "update", stopping)
        rounds(base, TOKENIZER, [[ONE], [TWO]], ON_POLICY, recursive=True, seed=4, folder=tmp_path)
    resumed = rounds(base, TOKENIZER, [[ONE], [TWO]], ON_POLICY, recursive=True, seed=4, folder=tmp_path)
    assert torch.equal(weights(resumed), expected)


@pytest.mark.parametrize("loss", ["empirical", "mine"])
def test_no_loss_is_unbounded_on_labels_without_a_tail(base, loss, monkeypatch):
    """A top label's weights sum to less than 1: by a constant added to the logits the loss could fall for ever."""
    monkeypatch.setitem(LOSSES, "mine", lambda logits, labels: -logits[..., 0])
    items = practice(base, TOKENIZER, ONE, 20, PracticeSettings(labels="top", label_top=5, max_new_tokens=6), seed=0)
    with pytest.raises(ValueError, match=f"the loss '{loss}' needs sampled or exact labels, but these are top"):
        distill(base, items, FitSettings(loss=loss))
    with pytest.raises(ValueError, match="these are top"):
        rounds(base, TOKENIZER, [[ONE]], RoundSettings(PracticeSettings(labels="top"), FitSettings(loss=loss)))
    with pytest.raises(ValueError, match="these are top"):
        AdditionSettings(loss="empirical", labels="top")
    distill(deepcopy(base), items, FitSettings(loss="hard"))  # it looks at the tokens alone


@pytest.mark.parametrize("on_policy", [True, False])
def test_a_loss_that_needs_probabilities_says_so_before_anything_is_done(base, on_policy, monkeypatch):
    for module in (distill_module, rounds_module):
        monkeypatch.setattr(module, "generate", None)
    settings = RoundSettings(PRACTICE, FitSettings(loss="reverse"), on_policy=on_policy)
    with pytest.raises(ValueError, match="the loss 'reverse' needs exact or top-k labels, but these are sampled"):
        rounds(base, TOKENIZER, [[ONE]], settings)
