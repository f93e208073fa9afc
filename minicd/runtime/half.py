"""Training with weights of half precision: a bf16 copy computes, and fp32 masters take the optimiser's steps.

A step changes a weight by far less than bf16 can tell apart; summed up in fp32 masters, no step is lost
(Micikevicius et al., 2018).
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn


class Working:
    """What computes: the model itself; or, if `half`, a copy whose learning weights are bf16.

    The model's own are then the copy's fp32 masters. Weights that do not learn are shared, whatever their
    precision.
    """

    def __init__(self, masters: nn.Module, half: bool):
        self.model, self.pairs = masters, []
        if half:
            self.copy(masters)

    def copy(self, masters: nn.Module) -> None:
        still = {id(p): p for p in masters.parameters() if not p.requires_grad}
        self.model = deepcopy(masters, still)
        self.pairs = [(master, half) for master, half in zip(masters.parameters(), self.model.parameters())
                      if master.requires_grad]
        for master, half in self.pairs:
            master.data, half.data = master.data.float(), half.data.bfloat16()

    @torch.no_grad()
    def hand_over(self) -> None:
        """Add the copy's gradients to those of the masters, and drop them: sums are in fp32."""
        for master, half in self.pairs:
            if half.grad is not None:
                master.grad = half.grad.float() if master.grad is None else master.grad.add_(half.grad)
                half.grad = None

    @torch.no_grad()
    def follow(self) -> None:
        """Take the masters' weights."""
        for master, half in self.pairs:
            half.copy_(master)
