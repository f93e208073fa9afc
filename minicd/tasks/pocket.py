"""The pocket base: a small T5 pretrained on generated text, in place of the paper's pretrained language model.

The text is list manipulation over random symbols, digits among them: copying, reversing, substituting, and made-up column
operations worked out step by step. **No item adds numbers**: the made-up operations are random tables which differ from
addition in every entry, answers that happen to be sums are drawn again, and a test scans the text for them. What the model
brings to addition is therefore what a pretrained model would bring: how to copy, align, look up and keep a scratchpad, but
not how to add.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

from ..checkpoint import load, save
from ..experiment import ROOT, RunFolder, option, record, write_record
from ..labels import Examples, LabelBatch
from ..metrics import exact_match
from ..report import minutes_line
from ..sampling import generate
from ..t5 import T5, T5Config, initialise
from ..tokenizer import TextTokenizer, word_tokenizer
from ..training import FitSettings, fit, length_buckets
from .pocket_instructions import held_out_rouge, world_item, world_tokenizer

Item = Callable[[random.Random, float], tuple[str, str]]

DIGITS = list(string.digits)
SYMBOLS = DIGITS + list(string.ascii_lowercase)
SEPARATORS = list("|&;@~^")
SCRATCHPAD = ["C:", "=>", ",", "#", "Final", "answer:"]
OPERATIONS = [f"op{i}" for i in range(2)]  # made-up operations with a carry, always worked out step by step
PAIRINGS = [f"pair{i}" for i in range(2)]  # made-up operations without one, answered at once
TASKS = ["copy", "reverse", "first", "last", "rest", "most", "join", "zip", "replace", "find", "columns", "max", "min"]
WORDS = [*SYMBOLS, "+", *SEPARATORS, *SCRATCHPAD, ":", "?", "(", ")", *TASKS, *OPERATIONS, *PAIRINGS,
         "step", "by", "add", "task", *[f"<extra_id_{i}>" for i in range(20)]]


def pocket_tokenizer() -> TextTokenizer:
    return word_tokenizer(WORDS)


def pocket_config(vocab_size: int) -> T5Config:
    """0.65 million parameters. 64 buckets of distance, since T5's 32 blur the distances within two 8-digit operands."""
    return T5Config(vocab_size=vocab_size, d_model=96, d_kv=16, d_ff=256, num_heads=6, num_layers=3,
                    num_decoder_layers=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
                    relative_attention_num_buckets=64, relative_attention_max_distance=128, dropout_rate=0.0)


def made_up_table(name: str) -> dict[tuple[str, str, str], tuple[str, str]]:
    """(digit, digit, carry) → (digit, carry): random, but never the entry that addition would have."""
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
    """Work a column operation out from the last column to the first; the scratchpad and the answer."""
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
    """Two lists: joined, interleaved, the larger or smaller column by column, or a made-up pairing of digits."""
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


def pocket_item(rng: random.Random, longest: int) -> tuple[str, str]:
    """One (prompt, answer) of the pretraining text."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    return kind(rng, rng.randint(1, longest))


class PocketText:
    """Endless pretraining batches by step number. `item(rng, done)` makes one (prompt, answer); done: the share of the steps."""

    WINDOW = 16  # batches made at a time and bucketed by length

    def __init__(self, tokenizer: TextTokenizer, steps: int, batch_size: int, seed: int, item: Item | None = None):
        self.tokenizer, self.steps, self.batch_size, self.seed = tokenizer, steps, batch_size, seed
        self.item, self.window, self.examples, self.order = item or list_item, -1, None, []

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, LabelBatch]:
        window, batch = divmod(step, self.WINDOW)
        if window != self.window:
            self.window, self.examples = window, self.make(window)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + window)
            self.order = length_buckets(self.examples, self.batch_size, generator, self.WINDOW)
        return self.examples.batch(self.order[batch])

    def make(self, window: int) -> Examples:
        rng = random.Random(f"{self.seed}/{window}")
        items = [self.item(rng, window * self.WINDOW / self.steps) for _ in range(self.WINDOW * self.batch_size)]
        return Examples.hard(self.tokenizer.encode_all([prompt for prompt, _ in items]),
                             self.tokenizer.encode_answers([answer for _, answer in items]))


def list_item(rng: random.Random, done: float) -> tuple[str, str]:
    """Short lists first: a model that starts with long ones never learns to copy."""
    return pocket_item(rng, min(11, 4 + round(14 * done)))


@dataclass
class Base:
    """What one of the two bases is made of, and where it is kept."""

    tokenizer: Callable[[], TextTokenizer]
    start: Callable[[TextTokenizer, int], T5]  # a model for the tokenizer, from a seed
    item: Item
    held_out: Callable[[T5, TextTokenizer, int], dict[str, float]]  # percent, on n held-out items of each kind
    folder: str  # in data/
    record: str  # scale of the record in results/


def pocket_model(tokenizer: TextTokenizer, seed: int) -> T5:
    return initialise(T5(pocket_config(-(-len(tokenizer) // 8) * 8)), seed)


def moved_base(tokenizer: TextTokenizer, seed: int) -> T5:
    """data/pocket with another vocabulary: it can copy and point, and has to learn new words, of which it keeps those it knows.

    Raises ValueError where data/pocket is missing or damaged.
    """
    old, old_tokenizer = load(ROOT / "data" / "pocket")
    model, known = pocket_model(tokenizer, seed), old_tokenizer.backend.get_vocab()
    with torch.no_grad():
        for (name, new), parameter in zip(model.named_parameters(), old.parameters(), strict=True):
            if name not in ("shared.weight", "lm_head.weight"):
                new.copy_(parameter)
                continue
            new.normal_(0.0, parameter.std().item(), generator=torch.Generator().manual_seed(seed))
            for word, i in tokenizer.backend.get_vocab().items():
                if word in known:
                    new[i] = parameter[known[word]]
    return model


@dataclass
class Settings:
    """How a pocket base is trained."""

    scale: str = option("pocket", "there is only the pocket scale")
    base: str = option("instructions", "instructions: the base of the experiments on instructions; lists: that of addition",
                       ["instructions", "lists"])
    steps: int = option(24000, "optimiser steps; those of data/pocket were 8000")
    batch: int = option(64, "batch size")
    lr: float = option(2e-3, "learning rate")
    optimiser: str = option("muon", "adamw, or muon for the matrices inside the layers", ["adamw", "muon"])
    held_out: int = option(500, "held-out items of each kind for the figures at the end")


QUICK = dict(steps=100, held_out=20)
SCALES = {"pocket": {}}


def train(settings: Settings, seeds: list[int], out: Path, device: torch.device, publish: bool = False) -> None:
    """`train.py --task pocket`: pretrain a base, measure it on held-out items; with --publish, install it in data/."""
    if len(seeds) > 1:
        raise ValueError("--task pocket trains one base: give it one seed")
    base = BASES[settings.base]
    tokenizer, folder = base.tokenizer(), RunFolder(out, settings, device)

    def make(progress: Path) -> T5:
        model = base.start(tokenizer, seeds[0]).to(device)
        fit_settings = FitSettings(lr=settings.lr, batch_size=settings.batch, warmup=0.02, decay=0.3, clip=1.0,
                                   optimiser=settings.optimiser)
        text = PocketText(tokenizer, settings.steps, settings.batch, seeds[0], base.item)
        print("Pretraining text, for example\n  " + "\n  ".join(" → ".join(base.item(random.Random(i), 0.0)) for i in range(8)))
        fit(model, text, fit_settings, seed=seeds[0], name=f"pocket base, {settings.base}", checkpoint=progress)
        return model

    model = folder.model("base", make, tokenizer, device)
    metrics = folder.value("held_out", lambda: base.held_out(model, tokenizer, settings.held_out))
    result = record("pocket", base.record, seeds, settings, [folder], {k: [v] for k, v in metrics.items()})
    write_record(result, out, publish)
    print(f"held-out items, %: {metrics}\n{minutes_line(result)}\nThe base is in {out / 'base'}")
    if publish:
        save(model, tokenizer, ROOT / "data" / base.folder)


def held_out_accuracy(model: T5, tokenizer: TextTokenizer, n: int) -> dict[str, float]:
    """Percent of n fresh items of each kind, lists of up to 8, answered exactly (greedy)."""
    result = {}
    for kind in KINDS:
        rng = random.Random(f"held-out/{kind.__name__}")
        items = [kind(rng, rng.randint(1, 8)) for _ in range(n)]
        completions = generate(model, tokenizer.encode_all([prompt for prompt, _ in items]), 90, temperature=0)
        right = [exact_match(tokenizer.decode(c), answer) for c, (_, answer) in zip(completions, items)]
        result[kind.__name__] = 100 * sum(right) / n
    return result


BASES = {"lists": Base(pocket_tokenizer, pocket_model, list_item, held_out_accuracy, "pocket", "base"),
         "instructions": Base(world_tokenizer, moved_base, world_item, held_out_rouge, "pocket-instructions", "instructions")}
