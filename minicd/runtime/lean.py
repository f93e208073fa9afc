"""Training in less memory, with the same numbers: logits by parts, blocks computed twice, small batches."""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import Embedding

LOGITS_AT_ONCE = 2**26  # of a batch; more are computed by parts, in forward and again in backward
READ_AT_ONCE = 4096  # tokens without gradients: more together take the CPU twice as long, and more memory
TRAIN_AT_ONCE = 2**26  # tokens × width × layers with gradients: the same of these
PART = 2**24  # logits of a part: smaller ones add to the head's gradient again and again


def loss_per_token(model: nn.Module, prompts: Tensor, labels, loss: Callable[..., Tensor]) -> Tensor:
    """loss(logits, labels) [B, T], where logits [B, T, V] need not be in memory at once.

    With more than LOGITS_AT_ONCE, the head and the loss see a few rows at a time, which backward computes
    anew: any loss of the signature in losses.py then needs the memory of these rows alone.
    """
    answers = labels.tokens.masked_fill(~labels.mask, model.config.pad_token_id)
    if labels.tokens.numel() * model.config.vocab_size <= LOGITS_AT_ONCE:
        logits = model(prompts, answers)
        with torch.autocast(logits.device.type, enabled=False):
            return loss(logits, labels)
    with without_head(model):
        states = model(prompts, answers)
    rows = max(1, PART // model.config.vocab_size)
    fields = [states, *vars(labels).values()]
    parts = zip(*(field.flatten(0, 1).split(rows) for field in fields))

    def part(x: Tensor, *fields: Tensor) -> Tensor:
        with added_in_place(model):
            logits = model.head(x[None])
        with torch.autocast(x.device.type, enabled=False):
            return loss(logits, type(labels)(*(field[None] for field in fields)))[0]
    return torch.cat([checkpoint(part, *each, use_reentrant=False) for each in parts]).view_as(labels.tokens)


@contextmanager
def without_head(model: nn.Module) -> Iterator[None]:
    """Inside, the model returns the states that its head would read."""
    model.head = lambda states: states
    try:
        yield
    finally:
        del model.head


@contextmanager
def added_in_place(model: nn.Module) -> Iterator[None]:
    """Inside, the product with the head's weights has a backward that needs no memory of their size."""
    tied = not hasattr(model, "lm_head")
    module = next((m for m in model.modules() if type(m) is Embedding)) if tied else model.lm_head
    name = "head" if tied else "forward"
    before = vars(module).get(name)
    setattr(module, name, partial(AddedProduct.apply, module.weight))
    try:
        yield
    finally:
        delattr(module, name)
        if before:
            setattr(module, name, before)


class AddedProduct(torch.autograd.Function):
    """x Wᵀ. Backward adds the gradient of W to W.grad; autograd would make one of its own for each part."""

    @staticmethod
    def forward(context, weight: Tensor, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        context.weight = weight
        return F.linear(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, dy: Tensor) -> tuple[None, Tensor]:
        (x,), weight = context.saved_tensors, context.weight
        if weight.requires_grad:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            add_product(weight.grad, dy.flatten(0, -2).t(), x.flatten(0, -2))
        return None, dy @ weight.to(dy.dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, whose factors may be of half precision: the sum stays in that of the total."""
    if a.dtype == b.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b.to(a.dtype)


@contextmanager
def checkpointed_blocks(model: nn.Module, on: bool) -> Iterator[None]:
    """Inside, backward computes each block's activations anew: they need the memory of one block."""
    blocks = [m for name, m in model.named_modules() if on and name.split(".")[-2:-1] == ["blocks"]]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def micro_batches(prompts: Tensor, labels, size: int) -> Iterator[tuple[Tensor, object]]:
    """A batch in parts of at most `size` rows."""
    fields = [prompts, *vars(labels).values()]
    for some, *own in zip(*(field.split(size) for field in fields)):
        yield some, type(labels)(*own)


def rows_together(config, rows: int, tokens: int, device: torch.device) -> int:
    """How many of a batch's rows, each of so many tokens, are trained on together unless a run says so.

    Parts that the CPU's caches hold take half the time of a wide batch, and less memory.
    """
    if device.type != "cpu":
        return rows
    parts = math.ceil(rows * tokens * config.d_model * config.num_layers / TRAIN_AT_ONCE)
    return math.ceil(rows / max(1, parts))
