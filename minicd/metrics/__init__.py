"""Metrics, from strings and counts alone. Rouge-L is in rouge.py."""

from __future__ import annotations

import numpy as np

from .rouge import rouge_l

__all__ = ["association", "exact_match", "rouge_l"]


def exact_match(prediction: str, reference: str) -> bool:
    """Equal but for surrounding and repeated spaces."""
    return prediction.split() == reference.split()


def association(accuracy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy [tasks, ids] of every task under every id, its own on the diagonal → with the right id, and the mean over the
    wrong ones, each [tasks] (paper, section 3.1, Table 1). Raises ValueError for a table that is not square, or of one task.
    """
    accuracy = np.asarray(accuracy, dtype=float)
    if accuracy.ndim != 2 or len(accuracy) < 2 or accuracy.shape[0] != accuracy.shape[1]:
        raise ValueError(f"association needs a square table of two tasks or more, not one of shape {accuracy.shape}")
    right = accuracy.diagonal()
    return right, (accuracy.sum(1) - right) / (len(accuracy) - 1)
