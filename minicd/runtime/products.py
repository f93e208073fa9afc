"""Matrix products in training by oneDNN, where it is measured to be faster than PyTorch's own."""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Embedding
from .fast import can_pack, packs_bf16

LARGE = 2**18  # weights of a model's largest layer from which the choice matters
PLAIN = [False, False, False]


def multiply(a: Tensor, b: Tensor, onednn: bool) -> Tensor:
    """a bᵀ: [..., n] and [m, n] → [..., m]."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "") if onednn else F.linear(a, b)


class Product(torch.autograd.Function):
    """x Wᵀ. `choice`: whether oneDNN computes it, the gradient of x, and that of W."""

    @staticmethod
    def forward(context, x: Tensor, weight: Tensor, choice: list[bool]) -> Tensor:
        context.save_for_backward(x, weight)
        context.choice = choice
        return multiply(x, weight, choice[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, weight), (_, first, second) = context.saved_tensors, context.choice
        return (multiply(dy, weight.t(), first),
                multiply(dy.flatten(0, -2).t(), x.flatten(0, -2).t(), second), None)


def linear(weight: Tensor, bias: Tensor | None, choice: list[bool], x: Tensor) -> Tensor:
    dtype = product_dtype(weight)
    y = Product.apply(x.to(dtype), weight.to(dtype), choice)
    return y if bias is None else y + bias.to(dtype)


def product_dtype(weight: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype


def fastest(model: nn.Module, rows: int) -> list[bool]:
    """`choice` for this many rows, measured on the model's largest layer; all plain for a small model."""
    weights = [m.weight.detach() for m in model.modules() if type(m) is nn.Linear]
    weight = max(weights, key=Tensor.numel, default=torch.zeros(0))
    dtype = product_dtype(weight)
    usable = weight.device.type == "cpu" and can_pack() and dtype == torch.float32  # bf16 is oneDNN's anyway
    if weight.numel() < LARGE or not usable:
        return PLAIN
    w, (out, width) = weight.to(dtype), weight.shape
    x, dy = w.new_ones(rows, width), w.new_ones(rows, out)
    return [faster(a, b) for a, b in ((x, w), (dy, w.t()), (dy.t(), x.t()))]


def faster(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN saves a tenth of the time of a bᵀ, in the best of three turns."""
    best = [float("inf")] * 2
    for onednn in (False, True) * 3:
        start = time.perf_counter()
        multiply(a, b, onednn)
        best[onednn] = min(best[onednn], time.perf_counter() - start)
    return best[True] < 0.9 * best[False]


@contextmanager
def chosen_products(model: nn.Module, choice: list[bool]):
    """Inside, the model's layers multiply by `choice`."""
    changed = []
    if any(choice) and can_pack():
        changed = [(m, "forward" if type(m) is nn.Linear else "head") for m in model.modules()
                   if type(m) in (nn.Linear, Embedding)]
    try:
        for module, name in changed:
            setattr(module, name, partial(linear, module.weight, getattr(module, "bias", None), choice))
        yield
    finally:
        for module, name in changed:
            delattr(module, name)
