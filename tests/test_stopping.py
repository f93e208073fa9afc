"""Who learns to stop where: the stop token's label, for every way in which a completion can end."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_t5

from minicd.distill import Context, PracticeSettings, distill, identity, practice
from minicd.hf.checkpoint import load
from minicd.losses import empirical, mean_over_tokens
from minicd.sampling import generate, score
from minicd.tasks.parts.inputs import few_shot_inputs
from minicd.tokenizer import word_tokenizer
from minicd.training import FitSettings

TOKENIZER = word_tokenizer(list("abcdefg"))
VOCABULARY, EOS = len(TOKENIZER), TOKENIZER.eos_id
STORIES = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "tinystories_260k"


def letters(n: int, rng: np.random.Generator) -> list[str]:
    return [" ".join(rng.choice(list("abcdefg"), size=3)) for _ in range(n)]


def context(extract) -> Context:
    return Context(letters, lambda x: f"{x} {x}", lambda x: x, extract)


def uniform_teacher():
    """Every token has the same probability at every position, so the stop token has 1 / V."""
    model = tiny_t5(VOCABULARY, seed=1)
    with torch.no_grad():
        model.shared.weight.zero_()
    return model


def stop_weights(items) -> torch.Tensor:
    """The share of the stop token in the label of every position."""
    labels = items.labels
    shares = []
    for row in range(len(labels.ids)):
        weights = labels.weights[labels.ids.starts[row] : labels.ids.starts[row + 1]].double()
        where = [i for i, token in enumerate(labels.ids[row]) if token == EOS]
        shares.append(weights[where].sum() / weights.sum())
    return torch.stack(shares)


@pytest.mark.parametrize("kind", ["sampled", "exact"])
def test_the_stop_token_is_labelled_once_where_f_keeps_everything(kind):
    """Its expected label is the teacher's e at each position, not e once more for a hard one at the end."""
    settings = PracticeSettings(kind, max_new_tokens=120)
    items = practice(uniform_teacher(), TOKENIZER, context(identity), 1500, settings, seed=3)
    e, shares = 1 / VOCABULARY, stop_weights(items)
    assert len(shares) > 10_000
    assert shares.mean().item() == pytest.approx(e, abs=0.002)  # 2e − e² would be 0.19
    last = items.answers.starts[1:] - 1
    assert (items.answers.values[last] == EOS).float().mean() > 0.99  # and the answers end with it
    assert shares[last].mean().item() == pytest.approx(e, abs=0.01)


def test_the_token_that_ends_an_answer_is_the_one_that_the_teacher_wrote():
    """Of several that end one, such as the end of a line; a hard label is that token. f does not see it."""
    teacher, other, seen = uniform_teacher(), 4, []
    object.__setattr__(teacher.config, "more_eos_token_ids", (other,))
    items = practice(teacher, TOKENIZER, context(lambda y: (seen.append(y), slice(None))[1]), 300, seed=3)
    ends = Counter(items.answers[i][-1] for i in range(300))
    assert set(ends) == {EOS, other} and min(ends.values()) > 100
    assert not {EOS, other} & {token for y in seen for token in y} and [y for y in seen] == [items.answers[i][:-1] for i in range(300)]
    prompts = [[5], [6], [7]] * 20
    made = {keep: generate(teacher, prompts, 60, generator=torch.Generator().manual_seed(0), keep_end=keep) for keep in (False, True)}
    assert [y[:-1] for y in made[True]] == made[False] and {y[-1] for y in made[True]} == {EOS, other}


def test_a_label_is_drawn_without_regard_to_the_token():
    """Of one sample each, it is the token itself as often as chance has it."""
    items = practice(uniform_teacher(), TOKENIZER, context(identity), 1500, PracticeSettings(label_samples=1, max_new_tokens=120), seed=3)
    assert len(items.labels.ids.values) == len(items.answers.values) > 10_000
    same = (items.labels.ids.values == items.answers.values).float().mean().item()
    assert same == pytest.approx(1 / VOCABULARY, abs=0.01)


def test_a_completion_cut_at_its_longest_does_not_teach_to_stop():
    teacher = tiny_t5(VOCABULARY, seed=4, initializer_factor=1.5)
    items = practice(teacher, TOKENIZER, context(identity), 200, PracticeSettings(max_new_tokens=5), seed=1)
    lengths = items.answers.lengths.tolist()
    ends = [items.answers[i][-1] for i in range(len(items))]
    assert max(lengths) == 5 and len(items.labels.ids) == sum(lengths)
    for i, (length, end) in enumerate(zip(lengths, ends)):
        assert EOS not in items.answers[i][:-1]
        assert length == 5 or end == EOS  # what is shorter ended by itself
    assert 0 < sum(end != EOS for end in ends) < len(items)


@pytest.mark.parametrize("found, answer, hard", [
    (slice(1, 3), [4, 5, EOS], True), (slice(0, 3), [3, 4, 5, EOS], True), (slice(None), [3, 4, 5, 6, EOS], False),
    (slice(-2, None), [5, 6, EOS], False), (slice(4, None), [EOS], False), (slice(0, 0), [EOS], True)])
def test_a_stop_token_after_what_f_cut_off_is_hard(monkeypatch, found, answer, hard):
    fixed(monkeypatch, [3, 4, 5, 6], "eos")
    items = practice(tiny_t5(VOCABULARY), TOKENIZER, context(lambda y: found), 1, PracticeSettings(), seed=0)
    assert items.answers[0] == answer
    assert (items.labels.ids[len(answer) - 1] == [EOS]) == hard


@pytest.mark.parametrize("found, answers", [
    (slice(1, 3), [[4, 5, EOS]]), (slice(None), [[3, 4, 5, 6]]), (slice(4, None), [])])
def test_a_completion_without_an_end(monkeypatch, found, answers):
    """A stop token follows what f cut off, and nothing else; an answer without any token is none."""
    fixed(monkeypatch, [3, 4, 5, 6], "length")
    if not answers:
        with pytest.raises(ValueError, match="only 0 of 1 completions"):
            practice(tiny_t5(VOCABULARY), TOKENIZER, context(lambda y: found), 1)
        return
    items = practice(tiny_t5(VOCABULARY), TOKENIZER, context(lambda y: found), 1)
    assert [items.answers[0]] == answers and len(items.labels.ids) == len(answers[0])


def fixed(monkeypatch, completion: list[int], why: str) -> None:
    """Let the teacher say this."""
    def say(model, prompts, *how, pick=None, keep_end, **more):
        said = [completion + [EOS] * (why == "eos")] * len(prompts), [why] * len(prompts)
        if pick is None:
            return said
        return *said, [pick(logits)[1:] for logits in score(model, prompts, [[*completion, EOS]] * len(prompts))]
    monkeypatch.setattr(sys.modules["minicd.distill"], "generate", say)


def test_the_stop_tokens_label_is_the_teachers_distribution_there(monkeypatch):
    teacher = tiny_t5(VOCABULARY, seed=4, initializer_factor=1.5)
    fixed(monkeypatch, [3, 4], "eos")
    items = practice(teacher, TOKENIZER, context(identity), 8, PracticeSettings("exact"), seed=0)
    prompts = [TOKENIZER.encode(f"{items.input(i)} {items.input(i)}") for i in range(8)]
    for i, logits in enumerate(score(teacher, prompts, [[3, 4, EOS]] * 8)):
        row = 3 * i + 2
        label = torch.zeros(VOCABULARY)
        label[items.labels.ids[row]] = items.labels.weights[row * VOCABULARY : (row + 1) * VOCABULARY]
        assert torch.allclose(label, logits[2].softmax(-1), atol=1e-5)


def test_the_teachers_prompt_decides_the_students_gradient(monkeypatch):
    """What the whole method is about: the same inputs and completions under another rich prompt teach otherwise."""
    teacher = tiny_t5(VOCABULARY, seed=4, initializer_factor=1.5)
    fixed(monkeypatch, [3, 4, 5], "eos")

    def gradient(template) -> torch.Tensor:
        made = Context(letters, template, lambda x: x, identity)
        items = practice(teacher, TOKENIZER, made, 16, PracticeSettings("exact"), seed=0)
        prompts, labels = items.batch(torch.arange(16))
        loss = mean_over_tokens(empirical(teacher(prompts, labels.tokens), labels), labels.mask)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(teacher.parameters()))])

    twice, again, other, none = map(gradient, (lambda x: f"{x} {x}", lambda x: f"{x} {x}", lambda x: f"g f {x}",
                                               lambda x: x))
    assert torch.equal(twice, again)
    assert torch.cosine_similarity(twice, other, 0) < 0.95
    assert none.norm() < 1e-3 * twice.norm()  # under the student's own prompt there is nothing to learn


def test_inputs_that_the_model_did_not_finish_are_not_used():
    draw = few_shot_inputs(uniform_teacher(), TOKENIZER, ["a b", "c d", "e f"], 2, max_new_tokens=8)
    lengths = [len(text.split()) for text in draw(100, np.random.default_rng(0))]
    assert max(lengths) == 7  # the eighth token would be the stop token


@pytest.mark.skipif(not STORIES.exists(), reason="the 260K model in ../shared/data/tinystories_260k is absent")
def test_a_real_students_completions_end_as_its_teachers():
    model, tokenizer = load(STORIES)
    names = ["Tom", "Lily", "Ben", "Anna", "Max", "Mia"]
    stories = Context(lambda n, rng: [f"{rng.choice(names)} and {rng.choice(names)}" for _ in range(n)],
                      lambda x: f"Once upon a time, there were two friends, {x}. One day,", lambda x: f"{x}:", identity)
    settings = PracticeSettings(max_new_tokens=24)
    items = practice(model, tokenizer, stories, 128, settings, seed=0)
    assert tokenizer.eos_id not in [items.answers[i][-1] for i in range(len(items))]
    distill(model, items, FitSettings(lr=1e-3, batch_size=16, precision="fp32"), epochs=4)
    prompts = [tokenizer.encode(stories.student(x)) for x in stories.inputs(30, np.random.default_rng(1))]
    _, reasons = generate(model, prompts, 24, generator=torch.Generator().manual_seed(0), reasons=True)
    assert reasons.count("length") >= 29
