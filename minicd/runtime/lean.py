"""Training in less memory, with the same numbers: logits by parts, blocks computed twice, small batches."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**26  # of a batch; more are computed by parts, in forward and again in backward
PART = 2**22  # logits of a part: larger ones are no faster


def loss_per_token(model: nn.Module, prompts: Tensor, labels, loss: Callable[..., Tensor]) -> Tensor:
    """loss(logits, labels) [B, T], where logits [B, T, V] need not be in memory at once.

    With more than LOGITS_AT_ONCE, the head and the loss see a few rows at a time, which backward computes
    anew: any loss of the signature in losses.py then needs the memory of these rows alone.
    """
    if labels.tokens.numel() * model.config.vocab_size <= LOGITS_AT_ONCE:
        logits = model(prompts, labels.tokens)
        with torch.autocast(logits.device.type, enabled=False):
            return loss(logits, labels)
    with without_head(model) as head:
        states = model(prompts, labels.tokens)
    rows = max(1, PART // model.config.vocab_size)
    fields = [states, *vars(labels).values()]
    parts = zip(*(field.flatten(0, 1).split(rows) for field in fields))

    def part(x: Tensor, *fields: Tensor) -> Tensor:
        logits = head(x[None])
        with torch.autocast(x.device.type, enabled=False):
            return loss(logits, type(labels)(*(field[None] for field in fields)))[0]
    return torch.cat([checkpoint(part, *each, use_reentrant=False) for each in parts]).view_as(labels.tokens)


@contextmanager
def without_head(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside, the model returns the states that its head would read; gives the head."""
    head, model.head = model.head, lambda states: states
    try:
        yield head
    finally:
        del model.head


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
    """A batch in parts of at most `size` rows (0: the whole batch)."""
    fields = [prompts, *vars(labels).values()]
    for some, *own in zip(*(field.split(size or len(prompts)) for field in fields)):
        yield some, type(labels)(*own)
