"""Training on the CPU: formulas computed part by part, so that what is between stays in the cache, with their
gradients written out. Plain operations pass ten times over tensors that no cache holds."""

from __future__ import annotations

from typing import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import os
PART = 2**int(os.environ.get("PART","19"))  # elements of a part: 0.5 MB in fp32


def pays(x: Tensor) -> bool:
    return x.device.type == "cpu" and torch.is_grad_enabled() and x.dtype != torch.float64


def parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors [N, ...] → the same few rows of all of them, again and again; off the CPU all rows at once."""
    first = tensors[0]
    rows = PART * len(first) // max(1, first.numel()) if first.device.type == "cpu" else len(first)
    return zip(*(t.split(max(1, rows)) for t in tensors))


class Norm(torch.autograd.Function):
    """n · weight with n = x / rms(x), in the type of the product that follows.  x [B, ..., d], weight [d]."""

    @staticmethod
    def forward(context, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        half = torch.is_autocast_enabled("cpu")
        y = torch.empty_like(x, dtype=torch.get_autocast_dtype("cpu") if half else weight.dtype)
        r = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)  # 1 / rms
        for x_, y_, r_ in parts(x, y, r):
            torch.rsqrt(x_.float().square().mean(-1, keepdim=True).add_(epsilon), out=r_)
            y_.copy_((x_ * r_).mul_(weight))
        context.save_for_backward(x, weight, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(context, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        """dx = (dn − n · mean(dn · n)) / rms(x)  with dn = dy · weight."""
        x, weight, r = context.saved_tensors
        dx, dweight, w = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32), weight.float()
        for x_, r_, dy_, dx_ in parts(x, r, dy, dx):
            n, dy_ = x_ * r_, dy_.float()
            product = dy_ * n
            dweight += product.flatten(0, -2).sum(0)
            mean = (product @ w)[..., None] / len(w)
            dx_.copy_((dy_ * w).addcmul_(n, mean, value=-1).mul_(r_))
        return dx, dweight.to(weight.dtype), None


class Rotation(torch.autograd.Function):
    """`rotate` of decoder.py; backward turns the gradient back."""

    @staticmethod
    def forward(context, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        context.save_for_backward(cos, sin)
        return turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(context, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = context.saved_tensors
        return turned(dy, cos, -sin), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, T, d], cos and sin [B, 1, T, d/2]."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for x_, cos_, sin_, y_ in parts(x, cos, sin, y):
        (a, b), (left, right) = x_.float().chunk(2, dim=-1), y_.chunk(2, dim=-1)
        left.copy_((a * cos_).addcmul_(b, sin_, value=-1))
        right.copy_((b * cos_).addcmul_(a, sin_))
    return y
