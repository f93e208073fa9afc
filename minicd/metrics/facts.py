"""How edits of facts are judged: score and magnitude of right against wrong objects (appendix A.2)."""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from .significance import bootstrap_interval

SCORES = ("paraphrase_score", "paraphrase_magnitude", "neighbourhood_score", "neighbourhood_magnitude")
Points = Sequence[Sequence[float]]  # an edit's SCORES, edit after edit


def log_probability(logits: Tensor, tokens: Sequence[int]) -> float:
    """log p(tokens) from logits [T, V]: the sum over all tokens, not divided by their number."""
    chosen = torch.tensor(list(tokens), device=logits.device)
    return float(logits.float().log_softmax(-1).gather(-1, chosen[:, None]).double().sum())


def preference(right: Sequence[float], wrong: Sequence[float]) -> tuple[float, float]:
    """Probabilities of the right and of the wrong object, prompt after prompt → score and magnitude in %.

    score = E[p(right) > p(wrong)], magnitude = E[p(right) − p(wrong)]. Raises ValueError without a prompt.
    """
    if not len(right) or len(right) != len(wrong):
        raise ValueError(f"{len(right)} probabilities of right objects and {len(wrong)} of wrong ones")
    difference = np.asarray(right, dtype=float) - np.asarray(wrong, dtype=float)
    return 100 * float((difference > 0).mean()), 100 * float(difference.mean())


def mean_scores(points: Points) -> np.ndarray:
    """The mean over the edits [4]: every edit weighs the same, however many prompts it has."""
    return np.asarray(points, dtype=float).mean(0)


def balance(points: Points) -> float:
    """The harmonic mean of paraphrase and neighbourhood score, by which prompts and rates are chosen.

    An edit that spoils the neighbourhood is worth as little as one that does nothing.
    """
    paraphrase, _, neighbourhood, _ = mean_scores(points)
    total = paraphrase + neighbourhood
    return 2 * float(paraphrase * neighbourhood / total) if total else 0.0


def at_equal_paraphrase(student: Points, others: Sequence[Points]) -> float:
    """The student's mean neighbourhood score minus that of the others where they paraphrase as well.

    `others` are points of a curve, such as one method at several learning rates; between them it is linear.
    A student that paraphrases better than all of them is compared with the best of them.
    """
    means = dict(sorted(tuple(mean_scores(points)[[0, 2]]) for points in others))  # of equal ones the best
    paraphrase, _, neighbourhood, _ = mean_scores(student)
    return float(neighbourhood - np.interp(paraphrase, list(means), list(means.values())))


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean over edits."""
    return bootstrap_interval([[value] for value in values], seed=seed)
