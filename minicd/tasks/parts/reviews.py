"""Reviews with labels, 1 good, 0 bad: files, splits, and the model as their author (paper, appendix A.1)."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from torch import nn

from ...runtime.files import atomic_bytes
from ...tokenizer import TextTokenizer
from .inputs import NearCopies, finished_inputs, until_enough, words

Labelled = list[tuple[str, int]]
KINDS = ("negative", "positive")  # by label
FEWEST = 3  # words of a beginning
# A hash of its words puts a review into a split: near copies are never in two.
SPLITS = {"test": range(0, 30), "validation": range(30, 45), "practice": range(45, 100)}


def split_of(text: str) -> str:
    bucket = zlib.crc32(" ".join(words(text)).encode()) % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def of_split(reviews: Labelled, *splits: str) -> Labelled:
    return [(text, label) for text, label in reviews if split_of(text) in splits]


def read_reviews(path: Path) -> Labelled:
    """Lines of a review, a tab, and its label. Near copies of earlier ones are left out.

    Raises ValueError, with file and line, for anything else, and where there are no reviews of one label.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}") from None
    reviews: dict[tuple[str, ...], tuple[str, int]] = {}
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut inside of reviews
        if not line.strip():
            continue
        text, tab, label = (part.strip() for part in line.rpartition("\t"))
        if "\t" not in line or label not in ("0", "1"):
            raise ValueError(f"{path}, line {number}: after the review there must be a tab and 1 or 0, "
                             f"not {label[-30:]!r}")
        if not words(text):
            raise ValueError(f"{path}, line {number}: the review is empty")
        reviews.setdefault(words(text), (text, int(label)))
    for label, kind in enumerate(KINDS):
        if not any(known == label for _, known in reviews.values()):
            raise ValueError(f"{path} has no {kind} review, that is, none with the label {label}")
    return list(reviews.values())


def write_reviews(path: Path, reviews: Labelled) -> None:
    atomic_bytes(path, "".join(f"{text}\t{label}\n" for text, label in reviews).encode())


def first_halves(reviews: Labelled) -> Labelled:
    """The first half of each review's words, of those that are long enough for a beginning."""
    halves = [(text.split()[: len(text.split()) // 2], label) for text, label in reviews]
    return [(" ".join(half), label) for half, label in halves if len(half) >= FEWEST]


def texts_of(reviews: Labelled, label: int) -> list[str]:
    return [text for text, known in reviews if known == label]


def written_reviews(model: nn.Module, tokenizer: TextTokenizer, examples: Labelled, n: int, what: str,
                    longest: int, seed: int = 0, shots: int = 6, precision: str | None = None,
                    temperature: float = 1.0) -> Labelled:
    """n reviews of each label by the model itself, which must end with the line, after `shots` examples.

    `what` names them in the prompt: "{kind} review". Each has at least FEWEST words, ends by itself within
    `longest` tokens, and is no near copy of an example or of another.
    Raises ValueError where the model does not write enough of them.
    """
    known, rng = NearCopies(text for text, _ in examples), np.random.default_rng((seed, 31))
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    found: Labelled = []
    for label, kind in enumerate(KINDS):
        title, shown = what.format(kind=kind).capitalize(), texts_of(examples, label)

        def ask(size: int) -> Labelled:
            prompts = [few_shot_prompt(title, rng.permutation(shown)[:shots]) for _ in range(size)]
            texts = finished_inputs(model, tokenizer, prompts, longest, generator, precision, temperature,
                                    read=without_tabs, progress="reviews by the model")
            return [(text, label) for text in texts if len(words(text)) >= FEWEST and known.add(text)]

        some = until_enough(n, ask)
        if len(some) < n:
            raise ValueError(f"asked for {n} texts after {title!r}, the model wrote only {len(some)} "
                             f"different ones that end within {longest} tokens: ask for fewer, or choose "
                             "another --model")
        found += some
    return found


def few_shot_prompt(title: str, shown: Sequence[str]) -> str:
    """After it a model writes one more."""
    return "\n".join([*(f"{title}: {text}" for text in shown), f"{title}:"])


def without_tabs(text: str) -> str:
    """They separate labels in files."""
    return text.replace("\t", " ").strip()
