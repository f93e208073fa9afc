"""A judge of reviews: naive Bayes on words and word pairs (appendix A.1; the paper's judge is GPT-3)."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Iterable, Sequence

SMOOTHING = 0.3  # added to every count
PAIR_SHARE = 0.5  # of a pair's weight: its words are counted, too
PAIR_LEAST = 2  # reviews that a pair must be in: what is seen once says little


class Judge:
    """Weights of words and pairs: positive ones speak for a good review, negative ones for a bad one."""

    def __init__(self, weights: dict[str, float]):
        self.weights = weights

    @classmethod
    def train(cls, reviews: Iterable[tuple[str, int]]) -> Judge:
        """From reviews with labels, 1 good, 0 bad. Raises ValueError where there are none of one kind.

        The weight of a word is the logarithm of its share of all words in good reviews over that in bad ones.
        A review counts a word once; both kinds are held to be equally likely.
        """
        counts = {0: Counter(), 1: Counter()}
        for text, label in reviews:
            counts[label].update(parts(text))
        for label, kind in enumerate(("bad", "good")):
            if not counts[label]:
                raise ValueError(f"a judge cannot be trained without {kind} reviews")
        known = [part for part in counts[0] | counts[1]
                 if " " not in part or counts[0][part] + counts[1][part] >= PAIR_LEAST]
        totals = [sum(counts[label][part] + SMOOTHING for part in known) for label in (0, 1)]
        def weight(part: str) -> float:
            bad, good = ((counts[label][part] + SMOOTHING) / totals[label] for label in (0, 1))
            return math.log(good / bad) * (PAIR_SHARE if " " in part else 1)
        return cls({part: weight(part) for part in known})

    def score(self, text: str) -> float:
        """More than 0: good; less: bad; 0: there is no word in it that the judge knows."""
        return sum(self.weights.get(part, 0.0) for part in parts(text))

    def share(self, texts: Sequence[str], label: int) -> float:
        """Percent of the texts that are judged to be of this label. One without known words is of neither."""
        sign = 1 if label else -1
        return 100 * sum(sign * self.score(text) > 0 for text in texts) / len(texts)

    def accuracy(self, reviews: Sequence[tuple[str, int]]) -> float:
        """Percent of the labelled reviews that are judged right."""
        right = [(1 if label else -1) * self.score(text) > 0 for text, label in reviews]
        return 100 * sum(right) / len(right)


def cross_validated(reviews: Sequence[tuple[str, int]], always: Sequence[tuple[str, int]] = (),
                    folds: int = 5) -> float:
    """Percent of the reviews that are judged right by a judge trained on the other folds and on `always`."""
    right = 0.0
    for k in range(min(folds, len(reviews))):
        training = [review for i, review in enumerate(reviews) if i % folds != k]
        held_out = reviews[k::folds]
        right += Judge.train([*training, *always]).accuracy(held_out) * len(held_out)
    return right / len(reviews)


def parts(text: str) -> list[str]:
    """The different words of a text, and its pairs of neighbours: 'not good' → not, good, 'not good'."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    return list(dict.fromkeys([*words, *map(" ".join, zip(words, words[1:]))]))
