"""D without a generator of its own: a pool of unlabelled inputs, or a model that continues a few examples."""

from __future__ import annotations

import math
import re
import sys
from typing import Callable, Container, Iterable, Sequence, TypeVar

import numpy as np
import torch
from torch import nn

from ...sampling import generate
from ...tokenizer import TextTokenizer
from .natural_instructions import inputs_prompt, read_input

Inputs = Callable[[int, np.random.Generator], list[str]]
Text = TypeVar("Text")  # alone, or with a label
TRIES = 10  # for each input that is asked for, on average


def pool(texts: Sequence[str]) -> Inputs:
    """Draws with repeats."""
    return lambda n, rng: [texts[i] for i in rng.integers(len(texts), size=n)]


def few_shot_inputs(model: nn.Module, tokenizer: TextTokenizer, examples: list[str], shots: int,
                    max_new_tokens: int, forbidden: Container[str] = frozenset(),
                    precision: str | None = None, temperature: float = 1.0) -> Inputs:
    """The model itself: after `shots` of the example inputs in random order it writes one more (section 3.1).

    What it does not finish within `max_new_tokens` is not used. Drawing raises ValueError where nine tenths
    of what it writes is unfinished, empty or forbidden (a test input).
    """
    def prompt(rng: np.random.Generator) -> str:
        return inputs_prompt(rng.permutation(examples)[:shots])
    return written_inputs(model, tokenizer, prompt, max_new_tokens, forbidden, precision, temperature)


def written_inputs(model: nn.Module, tokenizer: TextTokenizer, prompt: Callable[[np.random.Generator], str],
                   max_new_tokens: int, forbidden: Container[str] = frozenset(), precision: str | None = None,
                   temperature: float = 1.0, stop: Sequence[str] = ()) -> Inputs:
    """One input after each prompt that is drawn, up to a stop string or the model's own end."""
    def draw(n: int, rng: np.random.Generator) -> list[str]:
        generator = torch.Generator(next(model.parameters()).device).manual_seed(int(rng.integers(2**62)))

        def ask(size: int) -> list[str]:
            texts = finished_inputs(model, tokenizer, [prompt(rng) for _ in range(size)], max_new_tokens,
                                    generator, precision, temperature, stop)
            return [text for text in texts if text not in forbidden]

        found = until_enough(n, ask)
        if len(found) < n:
            raise ValueError(f"asked for {n} inputs, the model wrote only {len(found)} that can be used; "
                             f"others were empty, test inputs, or unfinished after {max_new_tokens} tokens: "
                             "choose another --model, or raise --max-input-tokens")
        return found
    return draw


def finished_inputs(model: nn.Module, tokenizer: TextTokenizer, prompts: list[str], max_new_tokens: int,
                    generator: torch.Generator, precision: str | None, temperature: float = 1.0,
                    stop: Sequence[str] = (), read: Callable[[str], str] = read_input,
                    progress: str = "inputs") -> list[str]:
    """What `read` finds in what the model writes after each prompt, without the empty and the unfinished."""
    ids = tokenizer.encode_all(prompts)
    written, reasons = generate(model, ids, max_new_tokens, temperature, generator=generator, reasons=True,
                                precision=precision, stop=stop, tokenizer=tokenizer, progress=progress)
    texts = (read(tokenizer.decode(y)) for y, why in zip(written, reasons) if why != "length")
    return [text for text in texts if text]


def until_enough(n: int, ask: Callable[[int], list[Text]]) -> list[Text]:
    """n of what `ask(size)` finds among `size` that it asks for; fewer where TRIES * n did not have them.

    A few prompts take as long as many: it is asked for as many as the share of usable ones needs.
    """
    found: list[Text] = []
    asked = 0
    while len(found) < n and asked < TRIES * n:
        share = max(len(found) / asked, 1 / TRIES) if asked else 1.0
        size = min(n, math.ceil((n - len(found)) / share))
        found, asked = found + ask(size), asked + size
    return found[:n]


class NearCopies(Container[str]):
    """Texts, and those with the same words: case, spaces and punctuation do not count.

    But the sign before a number does, and of a text without words all.
    """

    def __init__(self, texts: Iterable[str]):
        self.known = {essence(text) for text in texts}

    def __contains__(self, text: object) -> bool:
        return essence(str(text)) in self.known

    def add(self, text: str) -> bool:
        """Whether the text is new, which it is not the next time."""
        before = len(self.known)
        self.known.add(essence(text))
        return len(self.known) > before


def essence(text: str) -> tuple[str, ...]:
    """By which near copies are known."""
    found = re.findall(r"\w+|[-+−*×/÷^<=>%](?=\s*\d)", text.lower())
    return tuple(found or text.split())


def words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


def tell_unknown_words(tokenizer: TextTokenizer, prompt: str) -> None:
    """Before an answer that could surprise: what of the prompt the model cannot see."""
    if unknown := tokenizer.unknown_words(prompt):
        print(f"the model does not know {', '.join(map(repr, unknown))}", file=sys.stderr)


def derangement(n: int, rng: np.random.Generator) -> list[int]:
    """A random order of 0…n-1 without a number at its own place."""
    while True:
        order = rng.permutation(n)
        if (order != np.arange(n)).all():
            return order.tolist()
