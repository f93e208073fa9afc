"""The equation, against arithmetic done by hand and against the dense form that the code never builds."""

import math

import pytest
import torch
from helpers import tiny_t5
from torch.nn.functional import log_softmax

from minicd.labels import Examples, LabelBatch, Ragged, SoftLabels
from minicd.losses import LOSSES, empirical, find_loss, hard, label_kind, mean_over_tokens

# logits (0, ln 2, ln 3): exponentials 1, 2, 3 with sum 6, so p = (1/6, 2/6, 3/6) and logsumexp = ln 6
LOGITS = torch.tensor([[[0.0, math.log(2), math.log(3)]]], dtype=torch.float64)


def one_position(ids: list[int], weights: list[float], token: int = 0) -> LabelBatch:
    return LabelBatch(torch.tensor([[token]]), torch.tensor([[ids]]), torch.tensor([[weights]], dtype=torch.float64),
                      torch.tensor([[True]]))


def dense(labels: LabelBatch, vocabulary: int) -> torch.Tensor:
    """The target that `empirical` stands for: [B, T, V]."""
    target = torch.zeros(*labels.tokens.shape, vocabulary, dtype=labels.weights.dtype)
    return target.scatter_add(-1, labels.ids, labels.weights)


def random_labels(batch: int, length: int, vocabulary: int, samples: int) -> LabelBatch:
    """Soft labels of random distributions, with padded entries, all positions real, in fp64."""
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(batch * length, vocabulary, generator=generator)
    soft = SoftLabels.sample(logits, samples, generator)
    positions = torch.arange(batch * length).view(batch, length)
    mask = torch.ones(batch, length, dtype=torch.bool)
    ids, weights = soft.gather(positions, mask)
    weights = weights.double() / weights.double().sum(-1, keepdim=True)
    return LabelBatch(torch.randint(vocabulary, (batch, length), generator=generator), ids, weights, mask)


def test_empirical_by_hand():
    # 4 samples, token 0 once and token 2 three times: q̂ = (1/4, 0, 3/4)
    # CE = ln 6 − (1/4 · 0 + 3/4 · ln 3) = 1.791759469228 − 0.823959216501 = 0.967800252727
    labels = one_position([0, 2], [0.25, 0.75])
    assert empirical(LOGITS, labels).item() == pytest.approx(0.967800252727, abs=1e-12)
    # its gradient is p − q̂ = (1/6 − 1/4, 2/6 − 0, 3/6 − 3/4) = (−1/12, 1/3, −1/4)
    z = LOGITS.clone().requires_grad_()
    empirical(z, labels).sum().backward()
    assert torch.allclose(z.grad.flatten(), torch.tensor([-1 / 12, 1 / 3, -1 / 4], dtype=torch.float64), atol=1e-12)


def test_entries_beyond_a_label_weigh_nothing():
    assert empirical(LOGITS, one_position([0, 2, 1, 1], [0.25, 0.75, 0.0, 0.0])).item() == pytest.approx(0.967800252727)


def test_hard_by_hand():
    # −ln p: ln 6 = 1.791759469228, ln 3 = 1.098612288668, ln 2 = 0.693147180560
    for token, expected in enumerate([1.791759469228, 1.098612288668, 0.693147180560]):
        assert hard(LOGITS, one_position([0], [1.0], token)).item() == pytest.approx(expected, abs=1e-12)


def test_kl_from_label_to_student_is_the_loss_less_the_label_entropy():
    # q̂ = (1/2, 1/4, 1/4) against p = (1/6, 1/3, 1/2)
    # KL(q̂‖p) = 1/2 ln 3 + 1/4 ln 3/4 + 1/4 ln 1/2 = 0.549306144334 − 0.071920518113 − 0.173286795140 = 0.304098831081
    # KL(p‖q̂) = 1/6 ln 1/3 + 1/3 ln 4/3 + 1/2 ln 2 = −0.183102048111 + 0.095894024151 + 0.346573590280 = 0.259365566319
    # entropy of q̂ = 1/2 ln 2 + 2 · 1/4 ln 4 = 0.346573590280 + 0.693147180560 = 1.039720770840
    loss = empirical(LOGITS, one_position([0, 1, 2], [0.5, 0.25, 0.25])).item()
    assert loss - 1.039720770840 == pytest.approx(0.304098831081, abs=1e-11)
    assert abs(loss - 1.039720770840 - 0.259365566319) > 0.04  # the other direction is another number


def test_kl_and_loss_have_one_gradient_and_differ_by_the_entropy_everywhere():
    labels = random_labels(2, 5, 9, samples=7)
    target = dense(labels, 9)
    entropy = -torch.where(target > 0, target * target.log(), 0.0).sum(-1)
    for seed in range(3):
        z = torch.randn(2, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        kl = torch.where(target > 0, target * (target.log() - log_softmax(z, -1)), 0.0).sum(-1)
        assert torch.allclose(empirical(z, labels) - kl, entropy, atol=1e-12)
        (kl_gradient,) = torch.autograd.grad(kl.sum(), z)
        (gradient,) = torch.autograd.grad(empirical(z, labels).sum(), z)
        assert torch.allclose(gradient, kl_gradient, atol=1e-12)


def test_empirical_equals_dense_cross_entropy():
    labels = random_labels(3, 4, 11, samples=20)
    z = torch.randn(3, 4, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    dense_loss = -(dense(labels, 11) * log_softmax(z, -1)).sum(-1)
    loss = empirical(z, labels)
    assert loss.dtype == torch.float64 and torch.allclose(loss, dense_loss, rtol=0, atol=1e-12)
    upstream = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    gradients = [torch.autograd.grad(value, z, upstream)[0] for value in (loss, dense_loss)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-12)


def test_empirical_with_one_sample_is_hard():
    tokens = torch.tensor([[3, 0, 2]])
    ids, weights = SoftLabels.one_hot(tokens[0]).gather(torch.tensor([[0, 1, 2]]), torch.ones(1, 3, dtype=torch.bool))
    labels = LabelBatch(tokens, ids, weights, torch.ones(1, 3, dtype=torch.bool))
    z = torch.randn(1, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.equal(empirical(z, labels), hard(z, labels))
    gradients = [torch.autograd.grad(loss(z, labels).sum(), z)[0] for loss in (empirical, hard)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-15)


@pytest.mark.parametrize("loss", [empirical, hard])
def test_half_precision_logits_are_summed_in_fp32(loss):
    z = torch.full((1, 1, 4096), 1.0, dtype=torch.bfloat16)  # in bf16, ln 4096 + 1 = 9.318 would round to 9.3125
    value = loss(z, one_position([0], [1.0]))
    assert value.item() == pytest.approx(math.log(4096), abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_half_precision_logits_as_they_are(name):
    """Their rounding aside it computes in fp32, and its gradient is finite."""
    generator = torch.Generator().manual_seed(0)
    z = (5 * torch.randn(2, 3, 40, generator=generator)).bfloat16().requires_grad_()
    teacher, tokens = 2 * torch.randn(6, 40, generator=generator), torch.randint(40, (2, 3), generator=generator)
    soft = {"top": lambda: SoftLabels.top(teacher, 4), "exact": lambda: SoftLabels.top(teacher)}.get(
        LOSSES[name].labels, lambda: SoftLabels.sample(teacher, 100, generator))()
    mask = torch.ones(2, 3, dtype=torch.bool)
    labels, loss = LabelBatch(tokens, *soft.gather(torch.arange(6).view(2, 3), mask), mask), find_loss(name)
    values = loss(z, labels)
    assert torch.allclose(values.float(), loss(z.float(), labels), atol=1e-5)
    assert torch.autograd.grad(values.sum(), z)[0].isfinite().all()


@pytest.mark.parametrize("loss", [empirical, hard])
def test_logits_may_lie_in_any_order_in_memory(loss):
    """Of a model that has time before batch, for instance."""
    z = torch.randn(4, 3, 7).transpose(0, 1)
    tokens = torch.randint(7, (3, 4))
    labels = LabelBatch(tokens, tokens[..., None], torch.ones(3, 4, 1), torch.ones(3, 4, dtype=torch.bool))
    strided, plain = (x.detach().requires_grad_() for x in (z, z.contiguous()))
    assert not strided.is_contiguous()
    assert torch.equal(*(torch.autograd.grad(loss(x, labels).sum(), x)[0] for x in (strided, plain)))


def test_mean_over_tokens_by_hand():
    per_token = torch.tensor([[1.0, 2.0], [4.0, 99.0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert mean_over_tokens(per_token, mask).item() == pytest.approx(7 / 3)  # (1 + 2 + 4) / 3, the padding left out
    assert mean_over_tokens(per_token, torch.zeros(2, 2, dtype=torch.bool)).item() == 0.0
    assert mean_over_tokens(per_token, mask, 14.0).item() == pytest.approx(7 / 14)


@pytest.mark.parametrize("loss", [empirical, hard])
@pytest.mark.parametrize("huge", [1e30, float("nan"), float("inf")])
def test_padding_has_no_gradient_and_no_value(loss, huge):
    labels = random_labels(2, 3, 6, samples=5)
    labels.mask[1, 1:] = False
    labels.weights = labels.weights * labels.mask[..., None]
    z = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = mean_over_tokens(loss(z, labels), labels.mask)
    z[1, 1:, 2] = huge
    z.requires_grad_()
    value = mean_over_tokens(loss(z, labels), labels.mask)
    value.backward()
    assert torch.equal(value, expected)
    if math.isfinite(huge):
        assert torch.equal(z.grad[1, 1:], torch.zeros(2, 6, dtype=torch.float64))
    assert z.grad[0].abs().min() > 0 and z.grad[1, 0].abs().min() > 0


@pytest.fixture
def examples() -> Examples:
    """Six items whose prompts and answers have different lengths, with soft labels of 20 samples."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(2, 16, (n,), generator=generator).tolist() for n in (3, 1, 5, 2, 4, 7)]
    answers = Ragged.of([row[::-1] + [1] for row in rows])
    return Examples(Ragged.of(rows), answers, SoftLabels.sample(torch.randn(len(answers.values), 16, generator=generator), 20, generator))


def widened(prompts: torch.Tensor, labels: LabelBatch, columns: int) -> tuple[torch.Tensor, LabelBatch]:
    """The same batch with more padding: of prompts, of answers, and of label entries."""
    def wider(x: torch.Tensor, *widths: int, value=0) -> torch.Tensor:
        return torch.nn.functional.pad(x, widths, value=value)
    n = columns
    return wider(prompts, 0, n), LabelBatch(wider(labels.tokens, 0, n), wider(labels.ids, 0, n, 0, n, value=5),
                                            wider(labels.weights, 0, n, 0, n), wider(labels.mask, 0, n, value=False))


@pytest.mark.parametrize("loss", [empirical, hard])
def test_batching_changes_nothing(examples, loss):
    """Loss and gradient of a real model: more padding, another order, or smaller batches leave them as they are."""
    model = tiny_t5()

    def value_and_gradient(*batches):
        model.zero_grad()
        answer_tokens = sum(labels.mask.sum() for _, labels in batches)
        total = 0.0
        for prompts, labels in batches:
            mean = mean_over_tokens(loss(model(prompts, labels.tokens), labels), labels.mask)
            share = mean * labels.mask.sum() / answer_tokens
            share.backward()
            total += share.item()
        return total, torch.cat([p.grad.flatten() for p in model.parameters()])

    expected, gradient = value_and_gradient(examples.batch(torch.arange(6)))
    assert gradient.abs().max() > 0.01
    others = {"order": [examples.batch(torch.tensor([4, 2, 0, 5, 3, 1]))],
              "padding": [widened(*examples.batch(torch.arange(6)), columns=4)],
              "split": [examples.batch(torch.tensor(rows)) for rows in ([0, 3], [5], [1, 2, 4])]}
    for name, batches in others.items():
        other, other_gradient = value_and_gradient(*batches)
        assert other == pytest.approx(expected, abs=2e-6), name
        assert torch.allclose(other_gradient, gradient, atol=2e-6), name


def test_one_token_of_a_long_answer_weighs_as_much_as_a_short_answer():
    """The mean is over tokens, not over answers: 3 tokens of loss 1 and 1 token of loss 5 make (3 + 5) / 4."""
    per_token = torch.tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert mean_over_tokens(per_token, mask).item() == 2.0


def test_every_loss_names_its_kind_of_label_and_a_mere_function_takes_samples(monkeypatch):
    kinds = {"empirical": "sampled", "hard": "sampled", "exact": "exact", "topk": "top", "reverse": "exact",
             "jsd": "exact"}
    assert {name: label_kind(name) for name in LOSSES} == kinds
    monkeypatch.setitem(LOSSES, "mine", lambda logits, labels: logits[..., 0])
    assert label_kind("mine") == "sampled" and torch.equal(find_loss("mine")(LOGITS, None), LOGITS[..., 0])
