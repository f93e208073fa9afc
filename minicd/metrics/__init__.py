"""Metrics of strings and counts; those of Rouge-L, SQL, facts and reviews are in files of their own."""

from __future__ import annotations

from math import comb
from typing import Iterable, Sequence

import numpy as np

from .rouge import rouge_l
from .sql import sql_exact_match

__all__ = ["association", "correlation", "exact_match", "mcnemar", "rouge_l", "sql_exact_match"]
SHUFFLES = 100_000  # of `correlation`


def exact_match(prediction: str, reference: str) -> bool:
    """Whether they are equal but for surrounding and repeated spaces."""
    return prediction.split() == reference.split()


def association(accuracy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy [tasks, ids] → each task's accuracy with its right id, and its mean over the wrong ones.

    The right ids are on the diagonal (paper, section 3.1, Table 1). Raises ValueError for a table that is not
    square or has only one task.
    """
    accuracy = np.asarray(accuracy, dtype=float)
    if accuracy.ndim != 2 or len(accuracy) < 2 or accuracy.shape[0] != accuracy.shape[1]:
        raise ValueError(f"association needs a square table of two tasks or more, not {accuracy.shape}")
    right = accuracy.diagonal()
    return right, (accuracy.sum(1) - right) / (len(accuracy) - 1)


def correlation(points: Iterable[tuple[float, float]], seed: int = 0) -> tuple[float, float]:
    """Pearson's r and its one-sided p-value: the share of SHUFFLES random pairings with an r as large.

    0 and 1 where all x or all y are equal.
    """
    x, y = (np.array(side) - np.mean(side) for side in zip(*points))
    if not x.any() or not y.any():
        return 0.0, 1.0
    rng, scale = np.random.default_rng(seed), float(np.sqrt((x @ x) * (y @ y)))
    shuffled = (rng.permuted(np.tile(y, (1000, 1)), axis=1) @ x for _ in range(SHUFFLES // 1000))
    larger = sum(int((products >= x @ y - 1e-12).sum()) for products in shuffled)
    return float(x @ y) / scale, (larger + 1) / (SHUFFLES + 1)


def mcnemar(before: Sequence[float], after: Sequence[float]) -> float:
    """The exact two-sided p-value of McNemar's test (1947): did items scored twice change by chance alone?

    Only those count that got better or worse; by chance each is as likely, so that the smaller number follows
    Binomial(better + worse, 1/2). For scores other than 0 and 1 it is the sign test.
    Raises ValueError where the lists differ in length.
    """
    if len(before) != len(after):
        raise ValueError(f"McNemar's test compares the same items: here are {len(before)} and {len(after)}")
    better = sum(x < y for x, y in zip(before, after))
    worse = sum(x > y for x, y in zip(before, after))
    n = better + worse
    return min(1.0, 2 * sum(comb(n, k) for k in range(min(better, worse) + 1)) / 2**n)
