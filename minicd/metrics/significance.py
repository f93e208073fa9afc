"""How sure a difference is: a bootstrap interval, and an exact test of pairs."""

from __future__ import annotations

from typing import Sequence

import numpy as np

DRAWS = 10_000  # of the bootstrap


def bootstrap_interval(table: Sequence[Sequence[float]], percent: float = 95.0,
                       seed: int = 0) -> tuple[float, float]:
    """The interval of the mean of table [units, repeats]: units are drawn anew, and so are the repeats.

    For databases and seeds: both are a sample of more that could have been, and what a seed has chosen, such
    as a learning rate, serves for all its databases. Raises ValueError for no value.
    """
    values = np.asarray(table, dtype=float)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a bootstrap needs a table of units and repeats, not {values.shape}")
    rng, (units, repeats) = np.random.default_rng(seed), values.shape
    rows = rng.integers(units, size=(DRAWS, units, 1))
    means = values[rows, rng.integers(repeats, size=(DRAWS, 1, repeats))].mean((1, 2))
    low, high = np.percentile(means, [50 - percent / 2, 50 + percent / 2])
    return float(low), float(high)


def signed_rank(differences: Sequence[float]) -> float:
    """Wilcoxon's one-sided p: how often random signs give positive differences as large a sum of ranks.

    Exact. Zeros are dropped; equal sizes share their mean rank. 1 where nothing differs.
    """
    values = np.array([d for d in np.round(differences, 9) if d])  # rounding must not break ties
    sizes = np.abs(values)
    ranks = [int((sizes < size).sum() + (sizes <= size).sum() + 1) for size in sizes]  # twice the mean rank
    ways = np.zeros(sum(ranks) + 1)  # how many signs give each sum
    ways[0] = 1
    for rank in ranks:
        ways[rank:] = ways[rank:] + ways[:-rank]
    positive = sum(rank for rank, value in zip(ranks, values) if value > 0)
    return float(ways[positive:].sum() / ways.sum())
