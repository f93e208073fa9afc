"""How far a student has moved from its base where nothing was distilled."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn

from ...sampling import generate, score
from ...tokenizer import TextTokenizer

AT_ONCE = 2**27  # logits in memory together: half a gigabyte
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
    prompts, texts = [[row[side] for row in zip(asked, texts) if row[1]] for side in (0, 1)]
    divergence, _ = compare_along(base, student, prompts, texts, precision)
    return sum(divergence) / max(1, sum(map(len, texts)))


def compare_along(base: nn.Module, student: nn.Module, prompts: list[list[int]], texts: list[list[int]],
                  precision: str | None) -> tuple[list[float], list[float]]:
    """`compare` of two models that read the same texts after the same prompts."""
    return compare(*(lambda some, which=which: score(which, prompts[some], texts[some], precision=precision)
                     for which in (base, student)), texts, base)


def compare(teacher: Callable[[slice], list[Tensor]], student: Callable[[slice], list[Tensor]],
            tokens: list[list[int]], model: nn.Module) -> tuple[list[float], list[float]]:
    """For each answer: Σ KL(p ‖ q) over its tokens, and how often both have the same likeliest token."""
    size = max(1, AT_ONCE // (model.config.vocab_size * max([1, *map(len, tokens)])))
    divergence, same = [], []
    for start in range(0, len(tokens), size):
        some = slice(start, start + size)
        for p, q in zip(teacher(some), student(some)):
            log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
            divergence.append(float((log_p.exp() * (log_p - log_q)).sum()))
            same.append(int((p.argmax(-1) == q.argmax(-1)).sum()))
    return divergence, same
