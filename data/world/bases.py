"""The pocket bases: small models pretrained on generated text, in place of the paper's pretrained models.

data/pocket learns list manipulation (lists.py) and is the base for addition. data/pocket-instructions starts
from it, learns to follow instructions (instructions.py), and is the base for the experiments of section 3.1.
Both are T5s. data/pocket-sql, a decoder, learns from examples in its prompt what a database's users mean
(sql_text.py). `python train.py --task pocket` trains each.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn

from minicd.distill import combine_seeds
from minicd.hf.checkpoint import load, save
from minicd.labels import Examples, LabelBatch
from minicd.t5 import T5, T5Config, initialise
from minicd.tasks.parts import differs
from minicd.tasks.record import ROOT
from minicd.tasks.report import Record, pm, table
from minicd.tasks.run import Experiment, Stage
from minicd.tasks.settings import EvalSettings, RunSettings, option
from minicd.tokenizer import TextTokenizer
from minicd.training import OPTIMISERS, FitSettings, fit, length_buckets

from .instructions import held_out_rouge, world_item, world_tokenizer
from .lists import held_out_accuracy, list_item, plain_item, pocket_tokenizer
from .sql_text import SqlText, held_out_queries, learnt, next_level, sql_item, sql_model, sql_tokenizer

Item = Callable[[random.Random, float], tuple[str, str]]
PIECES, LAST = 20, 4  # of a training by level, and how many of them the last one counts for


def pocket_config(vocab_size: int) -> T5Config:
    """0.65 million parameters; 64 buckets of distance, since T5's 32 are too coarse for 8-digit operands."""
    return T5Config(vocab_size=vocab_size, d_model=96, d_kv=16, d_ff=256, num_heads=6, num_layers=3,
                    num_decoder_layers=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
                    relative_attention_num_buckets=64, relative_attention_max_distance=128, dropout_rate=0.0)


class PocketText:
    """Pretraining batches by step number. `item(rng, done)`: a (prompt, answer); done: the share of steps."""

    WINDOW = 16  # batches made at a time and bucketed by length

    def __init__(self, tokenizer: TextTokenizer, steps: int, batch_size: int, seed: int,
                 item: Item | None = None):
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
        done = window * self.WINDOW / self.steps
        items = [self.item(rng, done) for _ in range(self.WINDOW * self.batch_size)]
        return Examples.hard(self.tokenizer.encode_all([prompt for prompt, _ in items]),
                             self.tokenizer.encode_answers([answer for _, answer in items]))


@dataclass
class Base:
    """The parts of a base, and its places."""

    tokenizer: Callable[[], TextTokenizer]
    start: Callable[[TextTokenizer, int], nn.Module]  # a model for the tokenizer, from a seed
    item: Item
    held_out: Callable[[Any, TextTokenizer, int], dict[str, float]]  # percent on n items of each kind
    steps: int  # of training
    folder: str  # in data/
    record: str  # scale of the record in results/
    batch: int = 64
    by_level: bool = False  # its text becomes harder when the model is ready, not by the share of steps


def pocket_model(tokenizer: TextTokenizer, seed: int) -> T5:
    return initialise(T5(pocket_config(-(-len(tokenizer) // 8) * 8)), seed)


def transfer_base(tokenizer: TextTokenizer, seed: int) -> T5:
    """data/pocket with another vocabulary: its layers and known words are kept, new words are random.

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
class PocketSettings(RunSettings):
    """How a pocket base is trained."""

    base: str = option("instructions", "instructions: the base of the experiments on instructions; lists: "
                       "that of addition; sql: that of questions about databases",
                       choices=("instructions", "lists", "sql"))
    plain: bool = option(False, "lists without scratchpads: for comparison, never installed in data/")
    steps: int | None = option(None, "optimiser steps; unless told otherwise 24,000, 8,000 of lists, or "
                               "8,000 of sql", least=1, most=10**9)
    batch: int | None = option(None, "batch size; unless told otherwise 64, or 32 of sql", least=1,
                               most=10_000)
    lr: float = option(2e-3, "learning rate", above=0, most=10)
    optimiser: str = option("muon", "adamw, or muon for the matrices inside the layers", choices=OPTIMISERS)
    held_out: int = option(500, "of each kind, for the figures at the end", least=1, most=100_000,
                          unit="held-out items")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plain and self.base != "lists":
            raise ValueError("--plain: only the base of lists has scratchpads, --base lists")
        self.steps = self.steps or BASES[self.base].steps
        self.batch = self.batch or BASES[self.base].batch


class Pocket(Experiment):
    """Pretrain a base and measure it on held-out items; with --publish it is installed in data/."""

    TITLE = "A pocket base"
    RECORDS = ("base", "plain", "instructions", "sql")
    DIFFERS = differs.BASE
    Settings = PocketSettings
    QUICK = dict(steps=100, held_out=20)

    @property
    def kind(self) -> Base:
        return BASES[self.settings.base]

    @property
    def item(self) -> Item:
        return plain_item if self.settings.plain else self.kind.item

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        return self.kind.tokenizer()

    def stages(self) -> Iterator[Stage]:
        heading = "Pretraining text, for example"
        yield Stage("text", lambda: [self.item(random.Random(i), 0.0) for i in range(8)],
                    show=lambda items: "\n  ".join([heading, *map(" → ".join, items)]))
        yield from self.pieces() if self.kind.by_level else [Stage("base", self.train)]
        yield Stage("held_out", self.measure, ("base",))

    def train(self) -> nn.Module:
        s, model = self.settings, self.kind.start(self.tokenizer, self.seed).to(self.device)
        settings = FitSettings(lr=s.lr, batch_size=s.batch, warmup=0.02, decay=0.3, clip=1.0,
                               loss="hard", optimiser=s.optimiser, precision=s.precision)
        text = PocketText(self.tokenizer, s.steps, s.batch, self.seed, self.item)
        history = fit(model, text, settings, seed=self.seed, name="base",
                      checkpoint=self.folder.checkpoint("base"), save_every=s.save_every)
        self.folder.note("base", losses=history)
        return model

    def pieces(self) -> Iterator[Stage]:
        """Short trainings in a row: after each it shows whether the next may go on to a harder level."""
        level, last, piece, percents = 0, None, max(1, self.settings.steps // PIECES), []
        for i in range(PIECES - LAST):
            name, needs = f"piece-{i}", (last,) if last else ()
            yield Stage(name, partial(self.train_piece, name, last, level, piece, i), needs)
            yield Stage(f"learnt-{i}", partial(self.learnt, name, level), (name,),
                        lambda percent, i=i, level=level: f"piece {i}, level {level}: {percent:.1f} % right")
            if not self.folder.file(f"learnt-{i}"):
                return
            percents.append(self.folder.get(f"learnt-{i}"))
            before, level, last = level, next_level(level, percents), name
            percents = percents if level == before else []
        yield Stage("base", partial(self.train_piece, "base", last, level, LAST * piece, PIECES), (last,))

    def train_piece(self, name: str, last: str | None, level: int, steps: int, number: int) -> nn.Module:
        """Go on from the piece before. Only the last one's learning rate falls."""
        s = self.settings
        model = self.folder.get(last) if last else self.kind.start(self.tokenizer, self.seed).to(self.device)
        settings = FitSettings(lr=s.lr, batch_size=s.batch, warmup=0.02, decay=float(name == "base"),
                               clip=1.0, loss="hard", optimiser=s.optimiser, precision=s.precision)
        text = SqlText(self.tokenizer, level, steps, s.batch, combine_seeds((self.seed, number)))
        history = fit(model, text, settings, seed=self.seed, name=f"{name}, level {level}",
                      checkpoint=self.folder.checkpoint(name), save_every=s.save_every)
        self.folder.note(name, losses=history)
        return model

    def learnt(self, name: str, level: int) -> float:
        return learnt(self.folder.get(name), self.tokenizer, level, self.settings.held_out)

    def measure(self) -> dict[str, float]:
        return self.kind.held_out(self.folder.get("base"), self.tokenizer, self.settings.held_out)

    def figures(self) -> dict[str, Any]:
        return {"metrics": self.folder.get("held_out")}

    @classmethod
    def record_scale(cls, settings: PocketSettings) -> str:
        return "plain" if settings.plain else BASES[settings.base].record

    def publish(self) -> None:
        if not self.settings.plain:
            save(self.folder.get("base"), self.tokenizer, ROOT / "data" / self.kind.folder)

    @classmethod
    def table(cls, record: Record) -> str:
        rows = [[TITLES.get(name, name), pm(metric)] for name, metric in record["metrics"].items()]
        return table(["held-out items", "%"], rows)

    @classmethod
    def examine(cls, model: nn.Module, tokenizer: TextTokenizer, settings: EvalSettings, folder: Path) -> str:
        """`eval.py`: the same figures for the base with the tokenizer's words."""
        words = tokenizer.backend.get_vocab().keys()
        base = next((b for b in BASES.values() if b.tokenizer().backend.get_vocab().keys() == words), None)
        if base is None:
            raise ValueError(f"{folder} does not have the words of a pocket base")
        percent = base.held_out(model, tokenizer, 500)
        return "\n".join(f"{TITLES.get(name, name)}: {value:.1f} %" for name, value in percent.items())


TITLES = {"full": "definition, examples, explanations", "without_explanations": "without explanations",
          "bare": "bare input"}
BASES = {"lists": Base(pocket_tokenizer, pocket_model, list_item, held_out_accuracy, 8000, "pocket", "base"),
         "instructions": Base(world_tokenizer, transfer_base, world_item, held_out_rouge, 24000,
                              "pocket-instructions", "instructions"),
         "sql": Base(sql_tokenizer, sql_model, sql_item, held_out_queries, 8000, "pocket-sql", "sql",
                     batch=32, by_level=True)}
