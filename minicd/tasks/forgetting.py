"""How far a student has moved from its base where nothing was distilled."""

from __future__ import annotations

import torch
from torch import nn

from ..sampling import generate, score
from ..tokenizer import TextTokenizer

AT_ONCE = 8  # texts whose logits are in memory together
NEUTRAL = ["The capital of France is", "Water boils when", "To bake bread, first",
           "The river begins in the mountains and", "How to change a bicycle tyre:",
           "The history of the printing press starts in", "A triangle has three sides, and", "Bees live in",
           "The train to the coast leaves at", "To plant a tomato, you", "The moon moves around",
           "In chess, each player begins with", "A library is a place where", "The human heart has",
           "To tie a knot, take the rope and", "The seasons of the year are", "Paper is made from",
           "The desert at night is", "How to boil an egg:", "A computer program consists of",
           "The bridge was built in", "Wheat is harvested when", "The alphabet has",
           "To measure a table, you need"]


def kl_to_base(base: nn.Module, student: nn.Module, tokenizer: TextTokenizer, longest: int = 40,
               prompts: list[str] = NEUTRAL, seed: int = 0, precision: str | None = None) -> float:
    """Mean over tokens of KL(base ‖ student), in nats, on what the base itself writes after the prompts."""
    device = next(base.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    asked = tokenizer.encode_all(prompts)
    texts = generate(base, asked, longest, generator=generator, precision=precision, progress="neutral texts")
    pairs = [(prompt, text) for prompt, text in zip(asked, texts) if text]
    total = 0.0
    for first in range(0, len(pairs), AT_ONCE):
        some = [list(side) for side in zip(*pairs[first : first + AT_ONCE])]
        for rows in zip(*(score(model, *some, precision=precision) for model in (base, student))):
            p, q = (row.log_softmax(-1) for row in rows)
            total += float((p.exp() * (p - q)).sum())
    return total / max(1, sum(len(text) for _, text in pairs))
