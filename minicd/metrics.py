"""Metrics, from strings alone. Rouge-L is in rouge.py."""

from .rouge import rouge_l

__all__ = ["exact_match", "rouge_l"]


def exact_match(prediction: str, reference: str) -> bool:
    """Equal but for surrounding and repeated spaces."""
    return prediction.split() == reference.split()
