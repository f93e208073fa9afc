"""Metrics, from strings alone."""


def exact_match(prediction: str, reference: str) -> bool:
    """Equal but for surrounding and repeated spaces."""
    return prediction.split() == reference.split()
