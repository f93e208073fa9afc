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
    pairs = [(i, j) for i in range(n) for j in range(i)]
    if not pairs:
        return 0.0
    if len(pairs) > PAIRS:
        pairs = [pairs[k] for k in np.random.default_rng(seed).choice(len(pairs), PAIRS, replace=False)]
    split = [words(text) for text in texts]
    return 100 * float(np.mean([f_measure(split[i], split[j]) for i, j in pairs]))


def diversity(texts: Sequence[str]) -> dict[str, float]:
    """All three by name."""
    return {"entropy": word_entropy(texts), "distinct_2": distinct_2(texts), "rouge": mutual_rouge(texts)}
