"""Sums inside word problems: what nobody practises when additions are distilled (hypothesis 7).

Templates about people, things and places, filled in from a seed. Problems that choose a prompt have templates
and sums of their own. Operands are of equal length, as in the practised additions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Iterable

import numpy as np

COUNTS = {"test": 200, "validation": 100}
DIGITS, SHARES = (1, 2, 3), (0.06, 0.44, 0.5)  # of the answers, and how often: there are 21 sums below ten
RUN = 5  # words in a row from which two texts resemble each other

PEOPLE = ("Rosa", "Emil", "Nadia", "Tom", "Aylin", "Pedro", "Mia", "Jonas", "Salma", "Victor", "Lena", "Omar",
          "Grace", "Hugo", "Ines", "Kofi", "Petra", "Samir", "Wanda", "Yuki")
THINGS = ("lemons", "stamps", "marbles", "shells", "buttons", "pencils", "coins", "candles", "tulips",
          "apples", "postcards", "acorns", "bottles", "tickets", "spoons", "walnuts", "balloons", "stickers",
          "pebbles", "envelopes")
PLACES = ("in the garden", "at the market", "in the attic", "on the beach", "behind the school",
          "in the cellar", "near the station", "under the bridge", "at the harbour", "beside the lake")

TEMPLATES = {"test": (
    "{p} has {a} {things} and finds {b} more {place}. How many {things} does {p} have now?",
    "{p} owns {a} {things}. {q} owns {b}. How many {things} do the two of them own altogether?",
    "There are {a} {things} {place}. {p} brings {b} more. How many {things} are there then?",
    "{p} counted {a} {things} in the morning and another {b} in the afternoon. How many {things} did {p} "
    "count that day?",
    "One box holds {a} {things} and a second one holds {b}. {p} empties both boxes. How many {things} come "
    "out?",
    "{q} had {a} {things} before {p} gave {q} another {b}. How many {things} has {q} got by now?",
    "On Monday {p} sold {a} {things}, and on Tuesday {b}. How many {things} were sold on these two days "
    "together?",
    "Of the {things} {place}, {a} are red and the other {b} are blue. How many {things} is that in total?",
    "{p} lost {a} {things} {place}, then lost {b} more on the way home. How many {things} were lost in all?",
    "A lorry carries {a} {things}, and a van {b}. Both are unloaded {place}. What number of {things} is "
    "unloaded?",
    "{p} and {q} collect {things}. {p} picks up {a} of them {place}; {q} picks up {b}. What is the size of "
    "their joint collection?",
    "Last year {p} bought {a} {things}. This year {p} bought {b}. How many {things} did {p} buy over both "
    "years?",
    "When {p} moved in, {a} {things} were stored {place}. Since then {b} have been added and none taken "
    "away. How many {things} are stored there today?",
    "{p} needs {a} {things} for a party and {q} needs {b} for a wedding. How many {things} must they order "
    "between them?",
    "To the {a} {things} {place}, {p} and {q} add {b}. What is the new count of {things}?"),
    "validation": (
    "{p} made {a} {things} yesterday and {b} today. What is the total number of {things} that {p} made?",
    "A drawer contains {a} {things}. {q} puts in {b} further ones. How many {things} does it contain now?",
    "{p} photographs {a} {things} {place}, and {q} {b} different ones. How many {things} are photographed?",
    "The first shelf is for {a} {things} and the second one for {b}. How many {things} fit on both shelves?",
    "{p} received {a} {things} from {q} and {b} from an aunt. How many {things} did {p} receive?",
    "Two baskets stand {place}: {a} {things} are in one, {b} in the other. How many {things} are in them?")}


@dataclass(frozen=True)
class Problem:
    """A word problem that asks for a + b."""

    text: str
    a: int
    b: int

    @property
    def answer(self) -> str:
        return str(self.a + self.b)

    @property
    def equation(self) -> str:
        return f"{self.a} + {self.b} = {self.answer}"


@cache
def problems(seed: int = 2022) -> dict[str, tuple[Problem, ...]]:
    """Split → its problems. Every template of a split is used equally often; no sum twice in its order."""
    rng, sums = np.random.default_rng(seed), iter(draw_sums(sum(COUNTS.values()), seed))
    return {split: tuple(fill(templates[i % len(templates)], *next(sums), rng) for i in range(COUNTS[split]))
            for split, templates in TEMPLATES.items()}


def draw_sums(n: int, seed: int) -> list[tuple[int, int]]:
    """n different ordered pairs of equal length, at least 2 each: things come in plurals."""
    rng = np.random.default_rng((seed, 1))
    found: dict[tuple[int, int], None] = {}
    while len(found) < n:
        digits = int(rng.choice(DIGITS, p=SHARES))
        total = int(rng.integers(max(4, 10 ** (digits - 1)), 10**digits))
        a = int(rng.integers(2, total - 1))
        if len(str(a)) == len(str(total - a)):
            found[a, total - a] = None
    return list(found)


def fill(template: str, a: int, b: int, rng: np.random.Generator) -> Problem:
    p, q = rng.permutation(PEOPLE)[:2]
    words = {"p": p, "q": q, "things": rng.choice(THINGS), "place": rng.choice(PLACES)}
    return Problem(template.format(a=a, b=b, **words), a, b)


def as_question(a: int, b: int) -> str:
    """12, 34 → '1 2 + 3 4', as addition_questions.py writes it."""
    return f"{' '.join(str(a))} + {' '.join(str(b))}"


def asked_sums() -> frozenset[str]:
    """The test problems' sums as questions, in both orders: nobody may practise these."""
    pairs = [(problem.a, problem.b) for problem in problems()["test"]]
    return frozenset(as_question(*pair) for a, b in pairs for pair in ((a, b), (b, a)))


def result(text: str) -> str:
    """f: the first integer of an answer, or of what follows its last "=" where the sum is written out.

    Without leading zeros; empty where there is none.
    """
    found = re.search(r"\d+", text.rpartition("=")[2])
    return str(int(found[0])) if found else ""


# --- what resembles them ---


def runs_of_words(text: str, n: int = RUN) -> set[tuple[str, ...]]:
    """All n words in a row, with one sign for all numbers: another number makes no other text."""
    words = ["0" if word.isdigit() else word for word in re.findall(r"[a-z]+|\d+", text.lower())]
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


class Resembling:
    """Texts that share a run of words with a problem of either split."""

    def __init__(self, texts: Iterable[str] = (), n: int = RUN):
        texts = texts or [problem.text for some in problems().values() for problem in some]
        self.n, self.known = n, set().union(*(runs_of_words(text, n) for text in texts))

    def __contains__(self, text: str) -> bool:
        return not self.known.isdisjoint(runs_of_words(text, self.n))
