"""The text of the base data/pocket: list manipulation, as (prompt, answer), and its held-out accuracy.

The lists hold random symbols, digits among them. Tasks are copying, reversing, substituting, and made-up
column operations, worked out step by step. **No item adds numbers**: the made-up operations are random tables
that differ from addition in every entry, answers that happen to be sums are drawn again, and a test scans the
text for them. The model thus brings to addition what a pretrained model would bring: it can copy, align, look
up and keep a scratchpad, but not add.
"""

from __future__ import annotations

import random
import string

from minicd.metrics import exact_match
from minicd.sampling import generate
from minicd.t5 import T5
from minicd.tokenizer import TextTokenizer, word_tokenizer

DIGITS = list(string.digits)
SYMBOLS = DIGITS + list(string.ascii_lowercase)
SEPARATORS = list("|&;@~^")
SCRATCHPAD = ["C:", "=>", ",", "#", "Final", "answer:"]
OPERATIONS = [f"op{i}" for i in range(2)]  # made-up operations with a carry, worked out step by step
PAIRINGS = [f"pair{i}" for i in range(2)]  # made-up operations without one, answered at once
TASKS = ["copy", "reverse", "first", "last", "rest", "most", "join", "zip", "replace", "find", "columns",
         "max", "min"]
WORDS = [*SYMBOLS, "+", *SEPARATORS, *SCRATCHPAD, ":", "?", "(", ")", *TASKS, *OPERATIONS, *PAIRINGS,
         "step", "by", "add", "task", *[f"<extra_id_{i}>" for i in range(20)]]


def pocket_tokenizer() -> TextTokenizer:
    return word_tokenizer(WORDS)


def made_up_table(name: str) -> dict[tuple[str, str, str], tuple[str, str]]:
    """(digit, digit, carry) → (digit, carry): random, but never as in addition."""
    rng = random.Random(name)
    table = {}
    for a in range(10):
        for b in range(10):
            for carry in range(2):
                wrong = [d for d in range(10) if d != (a + b + carry) % 10]
                table[str(a), str(b), str(carry)] = str(rng.choice(wrong)), str(rng.randrange(2))
    return table


TABLES = {name: made_up_table(name) for name in OPERATIONS + PAIRINGS}


def column_scratchpad(a: list[str], b: list[str], table) -> tuple[str, list[str]]:
    """Work out a column operation from the last column to the first: scratchpad and answer."""
    carry, steps, answer = "0", [], []
    for x, y in zip(reversed(a), reversed(b)):
        digit, new_carry = table[x, y, carry]
        steps.append(f"{x} {y} C: {carry} => {digit} ,")
        answer, carry = [digit, *answer], new_carry
    if carry != "0":
        answer = [carry, *answer]
    return " ".join([*steps, f"C: {carry} #", *answer, "#"]), answer


def unary(rng: random.Random, length: int) -> tuple[str, str]:
    task = rng.choice(["copy", "reverse", "first", "last", "rest", "most"])
    x = rng.choices(SYMBOLS if rng.random() < 0.5 else DIGITS, k=length)
    y = {"copy": x, "reverse": x[::-1], "first": x[:1], "last": x[-1:], "rest": x[1:], "most": x[:-1]}[task]
    return f"{task} : {' '.join(x)}", " ".join(y)


def binary(rng: random.Random, length: int) -> tuple[str, str]:
    """Two lists: joined, interleaved, their larger or smaller items, or a made-up pairing of digits."""
    task = rng.choice(["join", "zip", "columns", "max", "min", *PAIRINGS])
    alphabet = DIGITS if task in PAIRINGS or rng.random() < 0.5 else SYMBOLS
    a, b = rng.choices(alphabet, k=length), rng.choices(alphabet, k=length)
    columns = list(zip(a, b))
    y = {"join": lambda: a + b, "zip": lambda: [s for c in columns for s in c],
         "columns": lambda: [s for c in reversed(columns) for s in c],
         "max": lambda: [max(c) for c in columns], "min": lambda: [min(c) for c in columns]}
    answer = y[task]() if task in y else [TABLES[task][p, q, "0"][0] for p, q in columns]
    if is_sum(a, b, answer):  # the larger of 0 and 5, for example
        return binary(rng, length)
    return f"{task} : {' '.join(a)} {rng.choice(SEPARATORS)} {' '.join(b)}", " ".join(answer)


def is_sum(a: list[str], b: list[str], answer: list[str]) -> bool:
    digits = all(symbol in DIGITS for symbol in [*a, *b, *answer])
    return digits and int("".join(a)) + int("".join(b)) == int("".join(answer))


def lookup(rng: random.Random, length: int) -> tuple[str, str]:
    """Replace one symbol by another, or find what follows a symbol."""
    x = rng.sample(SYMBOLS, length)
    i = rng.randrange(length)
    if rng.random() < 0.5:
        new = rng.choice(SYMBOLS)
        return f"replace {x[i]} => {new} : {' '.join(x)}", " ".join(new if s == x[i] else s for s in x)
    return f"find {x[i]} : {' '.join(x)}", " ".join(x[i + 1 : i + 2]) or "?"


def operation(rng: random.Random, length: int) -> tuple[str, str]:
    """A made-up column operation with a carry, step by step."""
    name = rng.choice(OPERATIONS)
    a, b = rng.choices(DIGITS, k=length), rng.choices(DIGITS, k=length)
    scratchpad, _ = column_scratchpad(a, b, TABLES[name])
    return f"{name} step by step : {' '.join(a)} {rng.choice(SEPARATORS)} {' '.join(b)}", scratchpad


KINDS = {unary: 0.3, binary: 0.3, lookup: 0.1, operation: 0.3}
PLAIN = {kind: share for kind, share in KINDS.items() if kind is not operation}  # without scratchpads


def pocket_item(rng: random.Random, longest: int, kinds: dict = KINDS) -> tuple[str, str]:
    """One (prompt, answer) of the pretraining text."""
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    return kind(rng, rng.randint(1, longest))


def list_item(rng: random.Random, done: float, kinds: dict = KINDS) -> tuple[str, str]:
    """Short lists first: a model that starts with long ones never learns to copy."""
    return pocket_item(rng, min(11, 4 + round(14 * done)), kinds)


def plain_item(rng: random.Random, done: float) -> tuple[str, str]:
    """The same without scratchpads: a base from this text has never seen the form of the teacher's."""
    return list_item(rng, done, PLAIN)


def held_out_accuracy(model: T5, tokenizer: TextTokenizer, n: int) -> dict[str, float]:
    """Percent of n fresh items of each kind, lists of up to 8, answered exactly (greedy)."""
    result = {}
    for kind in KINDS:
        rng = random.Random(f"held-out/{kind.__name__}")
        items = [kind(rng, rng.randint(1, 8)) for _ in range(n)]
        prompts = tokenizer.encode_all([prompt for prompt, _ in items])
        completions = generate(model, prompts, 90, temperature=0)
        right = [exact_match(tokenizer.decode(c), answer) for c, (_, answer) in zip(completions, items)]
        result[kind.__name__] = 100 * sum(right) / n
    return result
