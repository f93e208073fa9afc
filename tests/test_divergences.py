"""The losses on exact and top-k labels: by hand in each direction, and against the dense form that the code never builds."""

import math
from functools import partial

import pytest
import torch
from torch.nn.functional import log_softmax

from minicd.labels import LabelBatch, SoftLabels
from minicd.losses import find_loss, forward_kl, jsd, mean_over_tokens, reverse_kl

P = torch.tensor([[[0.0, math.log(2), math.log(3)]]], dtype=torch.float64)  # the student: 1/6, 2/6, 3/6
Q = torch.tensor([[0.0, math.log(3), math.log(4)]], dtype=torch.float64)  # the teacher: 1/8, 3/8, 4/8
LOSSES = {"forward": forward_kl, "reverse": reverse_kl, "jsd": jsd, "jsd 0.1": partial(jsd, beta=0.1)}


def batch(labels: SoftLabels, length: int, dtype=torch.float64) -> LabelBatch:
    """Labels of one row after the other [1, T], in fp64 and normalised as exactly as that allows."""
    mask = torch.ones(1, length, dtype=torch.bool)
    ids, weights = labels.gather(torch.arange(length)[None], mask)
    return LabelBatch(torch.zeros(1, length, dtype=torch.long), ids, weights.to(dtype), mask)


def exact(probabilities: list[list[float]]) -> LabelBatch:
    """Full labels [1, T, V] without rounding through fp32."""
    weights = torch.tensor([probabilities], dtype=torch.float64)
    ids = torch.arange(weights.shape[-1]).expand(weights.shape)
    return LabelBatch(torch.zeros(ids.shape[:2], dtype=torch.long), ids, weights, torch.ones(ids.shape[:2], dtype=torch.bool))


def dense(name: str, q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The divergences of two dense log-probabilities [..., V]."""
    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)
    beta = {"jsd": 0.5, "jsd 0.1": 0.1}.get(name)
    if beta is None:
        return kl(q, p) if name == "forward" else kl(p, q)
    m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


# q = (1/8, 3/8, 4/8), p = (1/6, 2/6, 3/6), m = their mean = (7/48, 17/48, 1/2)
# KL(q‖p) = 1/8 ln 3/4 + 3/8 ln 9/8             = −0.035960259056 + 0.044168638371 = 0.008208379315
# KL(p‖q) = 1/6 ln 4/3 + 1/3 ln 8/9             =  0.047947012075 − 0.039261011885 = 0.008686000190
# KL(q‖m) = 1/8 ln 6/7 + 3/8 ln 18/17           = −0.019268834977 + 0.021434405190 = 0.002165570212
# KL(p‖m) = 1/6 ln 8/7 + 1/3 ln 16/17           =  0.022255232104 − 0.020208207272 = 0.002047024832
@pytest.mark.parametrize("loss, expected", [(forward_kl, 0.008208379315), (reverse_kl, 0.008686000190),
                                            (jsd, (0.002165570212 + 0.002047024832) / 2)])
def test_by_hand(loss, expected):
    assert loss(P, exact([[1 / 8, 3 / 8, 4 / 8]])).item() == pytest.approx(expected, abs=1e-9)


def test_beta_is_a_setting_of_the_loss_jsd_alone():
    label = exact([[1 / 8, 3 / 8, 4 / 8]])
    assert find_loss("jsd", 0.1)(P, label).item() == pytest.approx(jsd(P, label, beta=0.1).item(), abs=1e-15)
    assert find_loss("reverse", 0.1)(P, label).item() == reverse_kl(P, label).item()
    for beta in (0.0, 1.0, -1.0, 2.0, math.nan):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            find_loss("jsd", beta)
    with pytest.raises(ValueError, match="there is no loss 'forwards'; losses: empirical, hard"):
        find_loss("forwards")


def test_the_ends_of_jsd_are_the_two_directions():
    """jsd / (1 − β) → KL(p‖q) for β → 1, and jsd / β → KL(q‖p) for β → 0 (Agarwal et al., 2024)."""
    label = exact([[1 / 8, 3 / 8, 4 / 8]])
    assert jsd(P, label, beta=1e-6).item() / 1e-6 == pytest.approx(0.008208379315, rel=1e-3)
    assert jsd(P, label, beta=1 - 1e-6).item() / 1e-6 == pytest.approx(0.008686000190, rel=1e-3)


def test_top_k_by_hand():
    # the teacher's two most likely tokens are 2 and 1: outcomes q = (4/8, 3/8, tail 1/8), p = (3/6, 2/6, tail 1/6):
    # with three tokens the tail is the third token, so both directions are those of the exact label;
    # with k = 1: q = (1/2, 1/2), p = (1/2, 1/2): nothing left to tell them apart
    two, one = (batch(SoftLabels.top(Q, k), 1) for k in (2, 1))
    assert two.ids.tolist() == [[[2, 1]]] and one.ids.tolist() == [[[2]]]
    assert forward_kl(P, two).item() == pytest.approx(0.008208379315, abs=1e-7)
    assert reverse_kl(P, two).item() == pytest.approx(0.008686000190, abs=1e-7)
    assert forward_kl(P, one).item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_exact_labels_give_the_dense_value_and_gradient(name):
    generator = torch.Generator().manual_seed(2)
    q, z = (2 * torch.randn(1, 7, 12, dtype=torch.float64, generator=generator) for _ in range(2))
    label = exact(q.softmax(-1)[0].tolist())
    order = torch.rand(1, 7, 12, generator=generator).argsort(-1)  # a label may name its tokens in any order
    label.ids, label.weights = label.ids.gather(-1, order), label.weights.gather(-1, order)
    z.requires_grad_()
    value, expected = LOSSES[name](z, label), dense(name, q.log_softmax(-1), log_softmax(z, -1))
    assert torch.allclose(value, expected, rtol=0, atol=1e-10)
    upstream = torch.rand(1, 7, dtype=torch.float64, generator=generator)
    gradients = [torch.autograd.grad(x, z, upstream)[0] for x in (value, expected)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-10) and gradients[0].abs().max() > 1e-2


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("k", [1, 3, 11])
def test_a_top_k_label_is_the_dense_loss_of_k_plus_one_outcomes(name, k):
    generator = torch.Generator().manual_seed(3)
    q, z = (torch.randn(5, 12, dtype=torch.float64, generator=generator) for _ in range(2))
    top = q.topk(k, -1)
    rest = torch.ones(5, 12, dtype=torch.bool).scatter(-1, top.indices, False)
    z.requires_grad_()

    def outcomes(x):
        p = x.softmax(-1)
        return torch.cat([p.gather(-1, top.indices), p.masked_fill(~rest, 0).sum(-1, keepdim=True)], -1).log()
    expected = dense(name, outcomes(q), outcomes(z))
    label = LabelBatch(torch.zeros(1, 5, dtype=torch.long), top.indices[None], q.softmax(-1).gather(-1, top.indices)[None],
                       torch.ones(1, 5, dtype=torch.bool))
    value = LOSSES[name](z[None], label)[0]
    assert torch.allclose(value, expected, rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad(x.sum(), z, retain_graph=True)[0] for x in (value, expected)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_like_the_teacher_has_no_loss_and_no_gradient(name):
    z = torch.randn(1, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    value = LOSSES[name](z, exact(z.detach().softmax(-1)[0].tolist()))
    assert value.abs().max() < 1e-12
    assert torch.autograd.grad(value.sum(), z)[0].abs().max() < 1e-9


@pytest.mark.parametrize("name", LOSSES)
def test_hard_and_padded_entries_stay_finite(name):
    """The stop token's label is one token of probability 1: log 0 for all others, with which `reverse` multiplies."""
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(5))
    labels = SoftLabels.join([SoftLabels.top(logits, 0), SoftLabels.one_hot(torch.tensor([4]))])
    label = batch(labels, 3, torch.float32)
    assert label.weights[0, 2].tolist() == [1.0] + [0.0] * 8
    z = torch.randn(1, 3, 9, generator=torch.Generator().manual_seed(6)).requires_grad_()
    value = LOSSES[name](z, label)
    gradient = torch.autograd.grad(value.sum(), z)[0]
    assert value.isfinite().all() and gradient.isfinite().all()
    assert gradient[0, 2, 4] < 0 < gradient[0, 2].sum() - gradient[0, 2, 4]  # towards the label, away from the rest


@pytest.mark.parametrize("name", LOSSES)
def test_padding_counts_for_nothing(name):
    label = exact([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
    z = torch.randn(1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    alone = mean_over_tokens(LOSSES[name](z[:, :1], exact([[0.2, 0.3, 0.5]])), torch.tensor([[True]]))
    label.mask[0, 1] = False
    label.weights = label.weights * label.mask[..., None]
    z.requires_grad_()
    value = mean_over_tokens(LOSSES[name](z, label), label.mask)
    assert value.item() == pytest.approx(alone.item(), abs=1e-12)
    assert (torch.autograd.grad(value, z)[0][0, 1] == 0).all()


@pytest.mark.parametrize("gap", [10, 24, 30, 40])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_a_student_who_is_sure_and_wrong_is_told_so(gap, dtype, tolerance):
    """KL(q ‖ p) has the gradient p − q, however far p is from q: about (1, 0, 0) − (0.02, 0.49, 0.49)."""
    label = exact([[0.02, 0.49, 0.49]])
    label.weights = label.weights.to(dtype)
    z = torch.tensor([[[gap, 0, 0]]], dtype=dtype).requires_grad_()
    value = find_loss("exact")(z, label)
    expected = 0.02 * math.log(0.02) + 0.98 * math.log(0.49) + 0.98 * gap + math.log1p(2 * math.exp(-gap))
    assert value.item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    p = torch.tensor([gap, 0, 0], dtype=torch.float64).softmax(-1)
    assert torch.allclose(gradient[0, 0].double(), p - label.weights[0, 0].double(), rtol=0, atol=tolerance)
    assert gradient[0, 0].tolist() == pytest.approx([0.98, -0.49, -0.49], abs=1e-4)


@pytest.mark.parametrize("gap", [10, 24, 40])
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_where_the_student_is_most_wrong_is_the_dense_one(name, k, gap):
    """Sure of a token that the teacher would not say, with k tokens of the label; the last 4 of 6 make the tail."""
    q = torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.05, 0.05]], dtype=torch.float64)
    label = batch(SoftLabels.top(q.log(), k), 1)
    z = torch.zeros(1, 1, 6, dtype=torch.float32)
    z[..., 5 if k < 5 else 4] = gap  # in the tail, or for k = 5 away from it
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(LOSSES[name](z, label).sum(), z)
    dense_z = z.detach().double().requires_grad_()
    named, log_p = label.ids[0, 0], dense_z.log_softmax(-1)[0]
    rest = [i for i in range(6) if i not in named.tolist()]
    outcomes = [torch.cat([x[:, named], x[:, rest].logsumexp(-1, keepdim=True)], -1) for x in (q.log(), log_p)]
    (expected,) = torch.autograd.grad(dense(name, *outcomes).sum(), dense_z)
    assert torch.allclose(gradient.double(), expected, rtol=1e-4, atol=1e-6)
    if name == "forward":
        assert gradient.abs().max() > 0.04


@pytest.mark.parametrize("gap", [10, 24, 40])
def test_a_tail_that_the_student_forgot_pulls_it_back(gap):
    """q = (1/2, tail 1/2), and the student gives the tail e^−gap: the gradient is p − q, about (1/2, −1/2)."""
    label = batch(SoftLabels.top(torch.tensor([[0.5, 0.25, 0.25]]).log(), 1), 1, torch.float32)
    z = torch.tensor([[[gap, 0.0, 0.0]]]).requires_grad_()
    (gradient,) = torch.autograd.grad(forward_kl(z, label).sum(), z)
    assert gradient[0, 0].tolist() == pytest.approx([0.5, -0.25, -0.25], abs=1e-4)


def test_the_direction_decides_what_a_narrow_student_does():
    """Two likely tokens, a student that can hold one: forward KL is as large as the gap, reverse is about ln 2.

    So is its pull: towards the second token in one direction, and none in the other.
    """
    label = exact([[0.5 - 1e-6, 0.5 - 1e-6, 2e-6]])
    z = torch.tensor([[[30.0, 0.0, 0.0]]], dtype=torch.float64).requires_grad_()
    values = [loss(z, label) for loss in (forward_kl, reverse_kl)]
    assert values[0].item() == pytest.approx(15 - math.log(2), abs=1e-3)
    assert values[1].item() == pytest.approx(math.log(2), abs=1e-3)
    pulls = [torch.autograd.grad(value.sum(), z)[0][0, 0].tolist() for value in values]
    assert pulls[0] == pytest.approx([0.5, -0.5, 0], abs=1e-4)
    assert pulls[1] == pytest.approx([0, 0, 0], abs=1e-9)
