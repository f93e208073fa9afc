"""Training's fp32 products by oneDNN, on CPUs where that is measured to be faster than PyTorch's own."""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Embedding
from .fast import can_pack

LARGE = 2**18  # weights of a model's largest layer from which the choice matters


def multiply(a: Tensor, b: Tensor, onednn: bool) -> Tensor:
    """a bᵀ: [..., n] and [m, n] → [..., m]."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "") if onednn else F.linear(a, b)


class Product(torch.autograd.Function):
    """x Wᵀ. `choice`: whether oneDNN computes it, the gradient of x, and that of W."""

    @staticmethod
    def forward(context, choice: list[bool], weight: Tensor, x: Tensor) -> Tensor:
        context.save_for_backward(weight, x)
        context.choice = choice
        return multiply(x, weight, choice[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, dy: Tensor) -> tuple[None, Tensor, Tensor]:
        (weight, x), choice = context.saved_tensors, context.choice
        dweight = multiply(dy.flatten(0, -2).t(), x.flatten(0, -2).t(), choice[2])
        return None, dweight, multiply(dy, weight.t(), choice[1])


def fastest(model: nn.Module, rows: int) -> list[bool]:
    """The choice for this many rows, measured on the largest layer; [] where there is none to make."""
    weights = [m.weight.detach() for m in model.modules() if type(m) is nn.Linear]
    w = max(weights, key=Tensor.numel, default=torch.zeros(0))
    if (w.numel() < LARGE or w.device.type != "cpu" or w.dtype != torch.float32
            or torch.is_autocast_enabled("cpu") or not can_pack()):  # in bf16, PyTorch's own is oneDNN
        return []
    x, dy = w.new_ones(rows, w.shape[1]), w.new_ones(rows, w.shape[0])
    return [faster(a, b) for a, b in ((x, w), (dy, w.t()), (dy.t(), x.t()))]


def faster(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN saves a tenth of the time of a bᵀ; each has three turns, of which the best counts."""
    best = [float("inf")] * 2
    for onednn in (False, True) * 3:
        start = time.perf_counter()
        multiply(a, b, onednn)
        best[onednn] = min(best[onednn], time.perf_counter() - start)
    return best[True] < 0.9 * best[False]


@contextmanager
def chosen_products(model: nn.Module, choice: list[bool]):
    """Inside, the model's layers without a bias, and its tied head, multiply by `choice`."""
    names = {nn.Linear: "forward", Embedding: "head"}
    changed = [(m, names[type(m)]) for m in model.modules() if any(choice) and can_pack()
               and type(m) in names and getattr(m, "bias", None) is None]
    try:
        for module, name in changed:
            setattr(module, name, partial(Product.apply, choice, module.weight))
        yield
    finally:
        for module, name in changed:
            delattr(module, name)
