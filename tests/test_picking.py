"""Tokens and their labels, drawn from the same logits while sampling."""

import sys

import numpy as np
import pytest
import torch
from helpers import tiny_t5
from test_checkpoint import FIXTURES

from minicd.distill import Context, PracticeSettings, identity, practice
from minicd.hf.checkpoint import load
from minicd.labels import likeliest
from minicd.layers import KVCache, attend, decoding_layout
from minicd.sampling import choose, draw, generate, score
from minicd.tokenizer import word_tokenizer

distill_module = sys.modules["minicd.distill"]  # minicd.distill itself is the function
TOKENIZER = word_tokenizer(list("abcdefgh"))
STOPS = [5, 8, 11]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- draw ---


@pytest.mark.parametrize("samples", [1, 7])
def test_draws_have_the_frequencies_of_the_softmax(samples):
    """Of every row its own; 30 tokens and two rows, 58 degrees of freedom: beyond 101 has probability 0.0004."""
    logits, rows = torch.randn(2, 30, generator=seeded(0)), 14_000 // samples
    drawn = draw(logits.repeat_interleave(rows, 0), samples, seeded(1)).view(2, -1)
    counts = torch.stack([torch.bincount(row, minlength=30) for row in drawn])
    expected = drawn.shape[1] * logits.double().softmax(-1)
    assert expected.min() > 5 and ((counts - expected).square() / expected).sum() < 101


def test_the_draws_of_a_row_are_independent():
    """Two draws of two equally likely words are equal half of the time: 0.5 ± 5 · 0.005."""
    first, second = draw(torch.zeros(10_000, 2), 2, seeded(2)).T
    assert (first == second).float().mean().item() == pytest.approx(0.5, abs=0.025)


def test_a_long_tail_keeps_its_share():
    """Half of the probability is spread over 100,000 words that fp32 sums could lose: 0.5 ± 5 · 0.0035."""
    logits = torch.cat([torch.tensor([np.log(100_000)]), torch.zeros(100_000)]).float()
    drawn = draw(logits.expand(20, -1), 1000, seeded(3))
    assert (drawn > 0).float().mean().item() == pytest.approx(0.5, abs=0.018)
    assert drawn[drawn > 0].float().mean().item() == pytest.approx(50_000, rel=0.03)  # 5 · 29,000 / 100 = 1,450


@pytest.mark.parametrize("point", [0.0, 0.5, 1 - 2**-24])
def test_what_has_no_probability_is_never_drawn(monkeypatch, point):
    """At the ends of the range of random numbers, and where one falls on the border of two words."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **how: torch.full(shape, point))
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, -torch.inf, 0.0, -torch.inf])
    assert draw(logits[None], 3).unique().tolist() == [1 if point < 0.5 else 4]


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_not_numbers(wrong):
    logits = torch.zeros(3, 5)
    logits[1, 2] = wrong
    with pytest.raises(ValueError, match="not numbers"):
        draw(logits, 2)


def test_the_likeliest_of_equals_is_the_first():
    logits = torch.randn(50, 400, generator=seeded(0)).mul(4).round().bfloat16()
    assert torch.equal(choose(logits, 0), logits.float().argmax(-1))


# --- generate(pick=…) ---


@pytest.fixture(params=["t5", "llama", "gpt2"])
def model(request):
    return tiny_t5(30, initializer_factor=3.0) if request.param == "t5" else load(FIXTURES / request.param)[0]


@pytest.fixture
def prompts() -> list[list[int]]:
    """Twenty common tokens, which a decoder reads once, and one to six more."""
    def some(n: int) -> list[int]:
        return torch.randint(12, 30, (n,), generator=generator).tolist()
    generator = seeded(0)
    common = some(20)
    return [common + some(1 + i % 6) for i in range(24)]


@pytest.mark.parametrize("batch_size", [512, 7])
def test_what_is_made_of_a_step_stands_at_its_token(model, prompts, monkeypatch, batch_size):
    """Here the logits themselves, against a second pass: also of the token that ended a completion, and where
    others had left the batch before."""
    kept, keep = [], KVCache.keep
    monkeypatch.setattr(KVCache, "keep", lambda self, rows: (kept.append(len(rows)), keep(self, rows))[1])
    generator = seeded(1)
    completions, reasons, made = generate(model, prompts, 12, stop=STOPS, batch_size=batch_size, generator=generator,
                                          pick=lambda z: (draw(z, 1, generator)[:, 0], z, z.argmax(-1)))
    lengths = [len(y) for y in completions]
    assert kept and len(set(lengths)) > 3 and len(set(reasons)) > 1, "rows ended at many steps"
    ended = [[*y, STOPS[0]][:12] for y in completions]  # which token ended it has no influence on its own logits
    for y, (z, best), scored in zip(ended, made, score(model, prompts, ended)):
        assert z.shape == (12, model.config.vocab_size)
        assert torch.allclose(z[: len(y)], scored, atol=1e-4, rtol=1e-4)
        assert torch.equal(best[: len(y)], z[: len(y)].argmax(-1))
    plain = generate(model, prompts, 12, stop=STOPS, batch_size=batch_size, generator=seeded(1))
    assert plain == completions, "the tokens are those of a plain call"


def test_a_batch_that_is_halved_makes_the_same(model, prompts, monkeypatch):
    def run(batch_size: int):
        generator = seeded(2)
        return generate(model, prompts, 6, generator=generator, batch_size=batch_size,
                        pick=lambda z: (draw(z, 4, generator)[:, 0], z.sum(-1)))
    expected, real = run(12), model.prefill
    monkeypatch.setattr(model, "prefill", lambda batch, n: real(batch, n) if len(batch) < 13 else oom())
    with pytest.warns(UserWarning, match="out of memory at a batch of 24"):
        found = run(24)
    assert found[:2] == expected[:2]
    assert all(torch.allclose(a, b, atol=1e-4) for (a,), (b,) in zip(found[2], expected[2]))


def oom():
    raise MemoryError


# --- practice ---


def letters(n: int, rng: np.random.Generator) -> list[str]:
    return [" ".join(rng.choice(list("abcdefgh"), size=3)) for _ in range(n)]


def context(extract=identity, teachers: int = 1) -> Context:
    return Context(letters, [lambda x, k=k: f"{x} {x} a" + k * " b" for k in range(teachers)], lambda x: x, extract)


def passes(monkeypatch) -> list[int]:
    """How many completions every second pass labels."""
    seen, real = [], distill_module.ensemble_logits
    monkeypatch.setattr(distill_module, "ensemble_logits", lambda *how: (seen.append(len(how[2])), real(*how))[1])
    return seen


@pytest.fixture(params=["t5", "decoder"])
def teacher(request):
    if request.param == "t5":
        return tiny_t5(len(TOKENIZER), seed=4, initializer_factor=1.5)
    model, _ = load(FIXTURES / "llama")
    model.config.eos_token_id = TOKENIZER.eos_id
    return model


@pytest.mark.parametrize("extract", [identity, lambda y: slice(1, 3) if len(y) > 2 else None, lambda y: slice(-1, None)])
def test_top_labels_are_those_of_a_second_pass(teacher, extract, monkeypatch):
    """They need no random numbers, so both ways answer alike: every label must stand with its own token."""
    settings = PracticeSettings("top", label_top=5, max_new_tokens=12, chunk=30)
    seen = passes(monkeypatch)
    while_sampling = practice(teacher, TOKENIZER, context(extract), 60, settings, seed=1)
    assert not seen
    monkeypatch.setattr(distill_module, "KEPT_MOST", 0)
    second_pass = practice(teacher, TOKENIZER, context(extract), 60, settings, seed=1)
    assert len(seen) == 2
    assert torch.equal(while_sampling.answers.values, second_pass.answers.values)
    assert torch.equal(while_sampling.answers.starts, second_pass.answers.starts)
    assert torch.equal(while_sampling.labels.ids.starts, second_pass.labels.ids.starts)
    assert torch.equal(while_sampling.labels.ids.values, second_pass.labels.ids.values)
    assert torch.allclose(while_sampling.labels.weights, second_pass.labels.weights, atol=1e-5)


def test_drawn_labels_have_the_mean_and_spread_of_a_second_pass(teacher):
    """Pearson's statistic of 60 draws at each token of many answers, the stop token's included: 1 for each degree
    of freedom, with a standard deviation of sqrt(2 / degrees)."""
    settings = PracticeSettings(label_samples=60, max_new_tokens=8)
    items = practice(teacher, TOKENIZER, context(), 300, settings, seed=2)
    prompts = [TOKENIZER.encode(f"{items.input(i)} {items.input(i)} a") for i in range(len(items))]
    q = torch.cat(score(teacher, prompts, [items.answers[i] for i in range(len(items))])).double().softmax(-1)
    counts = torch.zeros_like(q)
    rows = torch.repeat_interleave(torch.arange(len(q)), items.labels.ids.lengths)
    counts[rows, items.labels.ids.values.long()] = items.labels.weights.double()
    assert (counts.sum(-1) == 60).all()
    common = 60 * q > 2
    statistic = ((counts - 60 * q).square() / (60 * q * (1 - q)))[common]
    assert len(statistic) > 1000 and statistic.mean().item() == pytest.approx(1, abs=0.15)
    shifted = ((counts.roll(1, 0) - 60 * q).square() / (60 * q * (1 - q)))[common]
    assert shifted.mean() > 1.5, "labels of the token before would be noticed"


@pytest.mark.parametrize("changed, teachers", [
    ({}, 2), ({"labels": "exact"}, 1), ({"temperature": 0.7}, 1), ({"label_samples": 129}, 1),
    ({"labels": "top", "label_top": 129}, 1)])
def test_the_second_pass_stays_where_one_step_does_not_give_both(changed, teachers, monkeypatch):
    """Labels are of temperature 1, an ensemble's are averages, and all probabilities of all steps fill the memory."""
    settings, seen = PracticeSettings(**{"max_new_tokens": 6, **changed}), passes(monkeypatch)
    practice(tiny_t5(len(TOKENIZER)), TOKENIZER, context(teachers=teachers), 20, settings)
    assert len(seen) == 1


def test_likeliest_are_the_top_of_the_softmax():
    logits = torch.randn(4, 9, generator=seeded(0))
    ids, weights = likeliest(logits, 3)
    assert torch.equal(ids, logits.topk(3).indices)
    assert torch.allclose(weights, logits.softmax(-1).gather(-1, ids))


# --- attention to a cache in fp32 ---


@pytest.mark.parametrize("shared", [0, 6])
def test_autocast_leaves_a_cache_in_its_own_type(shared):
    """A row's own keys and values are not rounded to bf16 anew at every step."""
    generator = seeded(0)
    q = torch.randn(3, 4, 1, 8, generator=generator).bfloat16()
    k, v = decoding_layout(torch.randn(2, 3, 2, 7, 8, generator=generator))
    prefix = tuple(torch.randn(2, 1, 2, shared, 8, generator=generator).bfloat16().float()) if shared else None
    plain = attend(q.float(), k, v, torch.zeros(3, 1, 1, 7), 0.3, prefix)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(q, k, v, torch.zeros(3, 1, 1, 7), 0.3, prefix)
    assert found.dtype == torch.bfloat16
    assert (found.float() - plain).abs().max() < (0.02 if shared else 0.005)
