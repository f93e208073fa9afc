"""The equation: token-level losses between the student and the teacher's soft labels (paper, section 2.4).

At position t of the extracted answer f(y), the teacher's next-token distribution is
    q_t = p_θ0(· | T_teacher(x), y_<)        it sees the rich prompt and its own scratchpad,
and the student's is
    p_t = p_θ(· | T_student(x), f(y)_<t)     it sees the minimal prompt and the answer so far.

Every loss here has one signature, `loss(logits, labels) -> [B, T]`, and is a few lines long. To change the method, add a
function and name it in LOSSES; `train.py --loss NAME` then finds it. `labels` has, with K the widest label of the batch,
    tokens  [B, T]     the answer's tokens f(y)_t
    ids     [B, T, K]  the tokens that the soft label names
    weights [B, T, K]  their probabilities; zero where there are fewer than K
    mask    [B, T]     true at the answer's tokens, false at padding
"""

from __future__ import annotations

import torch
from torch import Tensor


def empirical(logits: Tensor, labels) -> Tensor:
    """KL(q̂ ‖ p) up to a constant: CE(q̂_t, p_t) = logsumexp(z_t) − Σ_v q̂_t(v) z_t(v).

    q̂ is the empirical distribution of (by default) 100 tokens drawn from q, so the gradient is unbiased and no dense
    [B, T, V] target is ever built. logits [B, T, V] → [B, T] nats.
    """
    z = at_least_fp32(logits)
    return z.logsumexp(-1) - (labels.weights * z.gather(-1, labels.ids)).sum(-1)


def hard(logits: Tensor, labels) -> Tensor:
    """Equation 1 as written: −log p(f(y)_t), the teacher's sampled token as the label. logits [B, T, V] → [B, T] nats."""
    z = at_least_fp32(logits)
    return z.logsumexp(-1) - z.gather(-1, labels.tokens[..., None])[..., 0]


def at_least_fp32(logits: Tensor) -> Tensor:
    """Half precision becomes fp32; fp32 and fp64 stay as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def mean_over_answers(per_token: Tensor, mask: Tensor) -> Tensor:
    """Sum over the real answer tokens of the batch ÷ their number; padding counts for nothing. → scalar."""
    return per_token.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


LOSSES = {"empirical": empirical, "hard": hard}
