"""How different samples are from each other: a student must not collapse to one ending (appendix A.1)."""

from __future__ import annotations

import math
from collections import Counter
from typing import Sequence

import numpy as np

from .rouge import f_measure, words

PAIRS = 1000  # of texts, for `mutual_rouge`


def word_entropy(texts: Sequence[str]) -> float:
    """Entropy of a word drawn from all texts, in bits. It grows with their number: compare equal ones."""
    counts = Counter(word for text in texts for word in text.lower().split())
    total = sum(counts.values())
    return sum(n / total * math.log2(total / n) for n in counts.values())


def distinct_2(texts: Sequence[str]) -> float:
    """Percent of the pairs of neighbouring words, in all texts, that are different (Li et al., 2016)."""
    pairs = [pair for text in texts for pair in zip(text.lower().split(), text.lower().split()[1:])]
    return 100 * len(set(pairs)) / max(1, len(pairs))


def mutual_rouge(texts: Sequence[str], seed: int = 0) -> float:
    """Mean Rouge-L, in percent, of two different texts: of all pairs, or of PAIRS random ones."""
    n = len(texts)
    if n < 2:
        return 0.0
    pairs = n * (n - 1) // 2
    chosen = (np.random.default_rng(seed).choice(pairs, PAIRS, replace=False).tolist() if pairs > PAIRS
              else range(pairs))
    split = [words(text) for text in texts]
    return 100 * float(np.mean([f_measure(split[i], split[j]) for i, j in map(pair_of, chosen)]))


def pair_of(k: int) -> tuple[int, int]:
    """Number k of the pairs (1, 0), (2, 0), (2, 1), (3, 0), …"""
    i = (1 + math.isqrt(1 + 8 * k)) // 2
    return i, k - i * (i - 1) // 2


def diversity(texts: Sequence[str]) -> dict[str, float]:
    """All three by name."""
    return {"entropy": word_entropy(texts), "distinct_2": distinct_2(texts), "rouge": mutual_rouge(texts)}
