"""Equation 1: token-level losses between the student and the teacher's soft labels (paper, section 2.4).

At position t of the extracted answer f(y), the teacher's next-token distribution is
    q_t = p_θ0(· | T_teacher(x), y_<)        it sees the rich prompt and its own scratchpad,
and the student's is
    p_t = p_θ(· | T_student(x), f(y)_<t)     it sees the minimal prompt and the answer so far.

Every loss here has one signature, `loss(logits, labels) -> [B, T]`, and is a few lines long. To change the
method, add a function and name it in LOSSES, with the kind of label it needs; `train.py --loss NAME` then
finds it. `labels` has, with K the widest label of the batch,
    tokens  [B, T]     the answer's tokens f(y)_t
    ids     [B, T, K]  the tokens that the soft label names
    weights [B, T, K]  their probabilities; zero where there are fewer than K
    mask    [B, T]     true at the answer's tokens; false at padding, whose losses have to be finite and are
                       left out of the mean
The logits may be bf16: `at_least_fp32`. Position t may look at position t alone, since the positions of a
large batch come by parts, as [1, n, V]. Values of different losses cannot be compared with each other.
A label is sampled (100 draws from q), exact (all of q), or top (the k most likely tokens). With a top label
the rest of the vocabulary is one more outcome, the tail: every sum below then runs over k + 1 outcomes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Callable

import torch
from torch import Tensor

from .runtime.checks import source_digest
from .runtime.fused import parts

FLOOR = 1e-10  # the least probability in the losses that take the logarithm of the label


def empirical(logits: Tensor, labels) -> Tensor:
    """KL(q̂ ‖ p) up to a constant: CE(q̂_t, p_t) = logsumexp(z_t) − Σ_v q̂_t(v) z_t(v).

    q̂ is the empirical distribution of (by default) 100 tokens drawn from q: the gradient is unbiased, and no
    dense [B, T, V] target is built. logits [B, T, V] → [B, T] nats.
    """
    # = z.logsumexp(-1) - (labels.weights * z.gather(-1, labels.ids)).sum(-1), with a quarter of the memory
    z, logsumexp = GatherAndLogSumExp.apply(logits, labels.ids)
    return logsumexp - (labels.weights * z).sum(-1)


def hard(logits: Tensor, labels) -> Tensor:
    """Equation 1 as written: −log p(f(y)_t), with the teacher's token as label. [B, T, V] → [B, T] nats."""
    z, logsumexp = GatherAndLogSumExp.apply(logits, labels.tokens[..., None])
    return logsumexp - z[..., 0]


def forward_kl(logits: Tensor, labels) -> Tensor:
    """KL(q ‖ p) = Σ_v q(v) (log q(v) − log p(v)), over the vocabulary, or the k top tokens and the tail."""
    q, p = log_probs_with_tail(logits, labels)
    return kl(q, p)


def reverse_kl(logits: Tensor, labels) -> Tensor:
    """KL(p ‖ q) = Σ_v p(v) (log p(v) − log q(v)): avoids what is unlikely under q (Gu et al., 2024)."""
    q, p = log_probs_with_tail(logits, labels)
    return kl(p, q)


def jsd(logits: Tensor, labels, beta: float = 0.5) -> Tensor:
    """Jensen-Shannon (Agarwal et al., 2024): β KL(q ‖ m) + (1 − β) KL(p ‖ m) with m = β q + (1 − β) p."""
    q, p = log_probs_with_tail(logits, labels)
    m = torch.logaddexp(q + math.log(beta), p + math.log(1 - beta))
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def kl(a: Tensor, b: Tensor) -> Tensor:
    """Log-probabilities [..., K] → Σ exp(a) (a − b) [...]."""
    return (a.exp() * (a - b)).sum(-1)


def log_probs_with_tail(logits: Tensor, labels) -> tuple[Tensor, Tensor]:
    """Teacher's and student's log-probabilities [B, T, K + 1] of the label's tokens and of the tail.

    The label's are at least FLOOR: one without a tail has log 0 there, which `reverse` multiplies with p. The
    student's have no floor: a clamp's gradient would be 0 where the student is most wrong.
    """
    z, logsumexp = GatherAndLogSumExp.apply(logits, labels.ids)
    named = labels.weights > 0
    q = labels.weights.to(z.dtype)
    log_q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], dim=-1).clamp(min=FLOOR).log()
    log_p = torch.cat([z, logsumexp_of_others(logits, labels.ids, named)], dim=-1) - logsumexp[..., None]
    outcomes = torch.cat([named, named.sum(-1, keepdim=True) < logits.shape[-1]], dim=-1)
    return log_q, log_p.masked_fill(~outcomes, math.log(FLOOR))


def logsumexp_of_others(logits: Tensor, ids: Tensor, named: Tensor) -> Tensor:
    """Over the tokens that are not `named` [B, T, K] among the ids → [B, T, 1]; over all if none is left.

    1 − Σ p(named) would be the same probability, but rounded to 0 where it is small.
    """
    named = named & (named.sum(-1, keepdim=True) < logits.shape[-1])
    hide = torch.zeros(ids.shape, device=ids.device).masked_fill(named, -torch.inf)
    z = at_least_fp32(logits)
    return z.scatter_add(-1, ids, hide.to(z.dtype)).logsumexp(-1, keepdim=True)


class GatherAndLogSumExp(torch.autograd.Function):
    """Logits [..., V], ids [..., K] → z at the ids [..., K] and logsumexp(z) [...], in at least fp32.

    The gradient is written out: autograd's holds four tensors as large as the logits at once, this one.
    Both go through the logits in parts, so that on the CPU there is never a copy of all of them in fp32.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = parts(logits.flatten(0, -2))
        logsumexp = torch.cat([at_least_fp32(z).logsumexp(-1) for z, in rows]).view(logits.shape[:-1])
        ctx.save_for_backward(logits, ids, logsumexp)
        return at_least_fp32(logits.gather(-1, ids)), logsumexp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_z: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor, None]:
        logits, ids, logsumexp = ctx.saved_tensors
        columns = logsumexp[..., None], grad_logsumexp[..., None]
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)  # its rows are views
        rows = (t.flatten(0, -2) for t in (logits, ids, grad_z, *columns, grad))
        for z, i, dz, l, dl, out in parts(*rows):
            out.copy_((at_least_fp32(z) - l).exp_().mul_(dl).scatter_add_(-1, i, dz))
        return grad, None


def at_least_fp32(logits: Tensor) -> Tensor:
    """Half precision becomes fp32; fp32 and fp64 stay as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def mean_over_tokens(per_token: Tensor, mask: Tensor, tokens: float | Tensor | None = None) -> Tensor:
    """The sum over the batch's answer tokens, without padding, ÷ their number. → scalar.

    `tokens` stands in for that number: with the mean of all batches, every token has the same weight.
    """
    return per_token.masked_fill(~mask, 0.0).sum() / (mask.sum().clamp(min=1) if tokens is None else tokens)


@dataclass(frozen=True)
class Loss:
    """An entry of LOSSES: the function, and the kind of label that practice must keep for it."""

    function: Callable[..., Tensor]
    labels: str = "sampled"  # or exact, or top; any: it looks at the tokens alone

    def __call__(self, logits: Tensor, labels, **how: float) -> Tensor:
        return self.function(logits, labels, **how)


LOSSES = {"empirical": Loss(empirical), "hard": Loss(hard, "any"), "exact": Loss(forward_kl, "exact"),
          "topk": Loss(forward_kl, "top"), "reverse": Loss(reverse_kl, "exact"), "jsd": Loss(jsd, "exact")}


def find_loss(name: str, beta: float = 0.5) -> Callable[..., Tensor]:
    """The loss of that name; `beta` is jsd's. Raises ValueError for an unknown name or a β outside (0, 1)."""
    if name not in LOSSES:
        raise ValueError(f"there is no loss {name!r}; losses: {', '.join(LOSSES)}")
    if name == "jsd" and not 0 < beta < 1:
        raise ValueError(f"jsd: β = {beta} must lie between 0 and 1; at the ends, use exact or reverse")
    return partial(jsd, beta=beta) if name == "jsd" else LOSSES[name]


def source(name: str) -> int | None:
    """A checksum of the loss as it is written: a run does not go on with a loss that has been edited."""
    entry = LOSSES[name]
    return source_digest(getattr(entry, "function", entry))


def label_kind(name: str) -> str:
    """What practice keeps for the loss: sampled, exact or top. A plain function takes sampled labels."""
    kind = getattr(LOSSES.get(name), "labels", "sampled")
    return "sampled" if kind == "any" else kind


def check_labels(name: str, kind: str) -> None:
    """Raises ValueError where the loss is no divergence on labels of this kind: sampled, exact or top.

    Samples are too few for a loss with log q. A top label leaves out a tail, without which `empirical` is
    unbounded: adding a constant to the logits lowers it.
    """
    needed = getattr(LOSSES.get(name), "labels", "sampled")
    refused = {"sampled": "top", "exact": "sampled", "top": "sampled"}.get(needed)
    if kind == refused:
        enough = "sampled or exact" if kind == "top" else "exact or top-k"
        raise ValueError(f"the loss {name!r} needs {enough} labels, but these are {kind}")
