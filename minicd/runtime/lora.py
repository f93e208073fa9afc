"""Low-rank adapters (Hu et al., 2021): fine-tune a model by W + (α / r) B A, with W as it is.

A student that is trained so shares W with its teacher until its adapters are merged into weights of its own:
there is one copy of the model in memory, and optimiser states for A and B alone.
"""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALPHA = 16.0  # the scale α: with α / r, one learning rate serves all ranks


class LowRank(nn.Linear):
    """A linear layer x Wᵀ + b, whose W and b stay, plus (α / r) x Aᵀ Bᵀ with A [r, in], B [out, r] = 0."""

    def __init__(self, layer: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias, self.scale = layer.weight, layer.bias, ALPHA / rank
        like = layer.weight
        a = torch.randn(rank, self.in_features, generator=generator) * self.in_features**-0.5
        self.lora_a = nn.Parameter(a.to(like))
        self.lora_b = nn.Parameter(like.new_zeros(self.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_a.to(x.dtype), self.lora_b.to(x.dtype)  # fp32 masters beside a W in bf16
        return super().forward(x) + self.scale * F.linear(F.linear(x, a), b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that computes the same, with a weight of its own, in the precision of W."""
        layer = nn.Linear(self.in_features, self.out_features, device="meta")
        weight = self.weight + self.scale * self.lora_b @ self.lora_a
        layer.weight = nn.Parameter(weight.to(self.weight.dtype))
        layer.bias = self.bias
        return layer


def copy_to_train(model: nn.Module, rank: int) -> nn.Module:
    """A copy; with adapters it holds the very parameters of the model, since it leaves them as they are."""
    shared = {id(parameter): parameter for parameter in model.parameters()} if rank else None
    return deepcopy(model, shared)


@contextmanager
def adapters(model: nn.Module, rank: int, seed: int):
    """Inside, the matrices of the blocks have adapters, and nothing else learns; then they are merged.

    On an error they are merged, too, so that the model is as far as it got. Rank 0: nothing happens.
    """
    if not rank:
        yield
        return
    learnt = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    replace(model, nn.Linear, lambda layer: LowRank(layer, rank, generator))
    try:
        yield
    finally:
        replace(model, LowRank, LowRank.merged)
        for parameter, learns in learnt:
            parameter.requires_grad_(learns)


def replace(model: nn.Module, kind: type, made) -> None:
    """Put `made(layer)` in the place of each layer of exactly this kind inside the blocks."""
    inside = [(parent, name, layer) for path, parent in model.named_modules() if "blocks." in f"{path}."
              for name, layer in parent.named_children() if type(layer) is kind]
    for parent, name, layer in inside:
        setattr(parent, name, made(layer))
