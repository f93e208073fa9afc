"""Training on the CPU: work part by part, so that what is between stays in the cache."""

from __future__ import annotations

from typing import Iterator

import torch
from torch import Tensor

PART = 2**19  # elements of a part: 2 MB in fp32


def parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors [N, ...] → a few rows of all of them after the other; off the CPU all rows at once."""
    first = tensors[0]
    rows = PART * len(first) // max(1, first.numel()) if first.device.type == "cpu" else len(first)
    return zip(*(t.split(max(1, rows)) for t in tensors))


class Rotation(torch.autograd.Function):
    """`rotate` of decoder.py, of x [B, heads, T, d] by cos and sin [B, 1, T, d/2]. Backward turns back."""

    @staticmethod
    def forward(context, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        context.save_for_backward(cos, sin)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for x_, cos_, sin_, y_ in parts(x, cos, sin, y):
            (a, b), (left, right) = x_.float().chunk(2, dim=-1), y_.chunk(2, dim=-1)
            left.copy_((a * cos_).addcmul_(b, sin_, value=-1))
            right.copy_((b * cos_).addcmul_(a, sin_))
        return y

    @staticmethod
    def backward(context, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = context.saved_tensors
        return Rotation.apply(dy, cos, -sin), None, None
