"""The pocket bases: small T5s pretrained on generated text, in place of the paper's pretrained language models.

data/pocket learns list manipulation (lists.py) and serves addition; data/pocket-instructions goes on from it, learns to follow
instructions (instructions.py), and serves the experiments of section 3.1. `python train.py --task pocket` trains either.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

from minicd.hf.checkpoint import load, save
from minicd.labels import Examples, LabelBatch
from minicd.t5 import T5, T5Config, initialise
from minicd.tasks.experiment import ROOT, RunFolder, option, record, write_record
from minicd.tasks.report import minutes_line
from minicd.tokenizer import TextTokenizer
from minicd.training import FitSettings, fit, length_buckets

from .instructions import held_out_rouge, world_item, world_tokenizer
from .lists import held_out_accuracy, list_item, pocket_tokenizer

Item = Callable[[random.Random, float], tuple[str, str]]

def pocket_config(vocab_size: int) -> T5Config:
    """0.65 million parameters. 64 buckets of distance, since T5's 32 blur the distances within two 8-digit operands."""
    return T5Config(vocab_size=vocab_size, d_model=96, d_kv=16, d_ff=256, num_heads=6, num_layers=3,
                    num_decoder_layers=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
                    relative_attention_num_buckets=64, relative_attention_max_distance=128, dropout_rate=0.0)


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


BASES = {"lists": Base(pocket_tokenizer, pocket_model, list_item, held_out_accuracy, "pocket", "base"),
         "instructions": Base(world_tokenizer, moved_base, world_item, held_out_rouge, "pocket-instructions", "instructions")}
