"""Training and labelling speed: minicd against Hugging Face transformers' T5, same weights and same batches.

    pip install transformers                  # needed by this benchmark only
    OMP_NUM_THREADS=1 python -m bench.train   # from the repository's root; about 4 minutes on a free CPU core
    OMP_NUM_THREADS=1 python -m bench.train --compile --out results/bench-compile.json  # without transformers

Both sides take turns in one process; a figure is the median over the rounds, after one untimed turn each.
They must first compute the same loss. "Answers written" is greedy decoding alone: random weights write a
fixed number of tokens. "Practised" is all of practice, by a trained model that stops: it samples scratchpads
and draws the soft labels.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace as Shape
from typing import Any, Callable

import numpy as np
import torch

from bench.common import ROOT, Parser, count, guarded, import_transformers, parsed, publish, turns
from data.world.bases import pocket_config
from data.world.lists import operation, pocket_tokenizer
from minicd import Context, PracticeSettings, identity, practice, sampling
from minicd.hf.checkpoint import load, save
from minicd.labels import LabelBatch
from minicd.runtime.device import autocast
from minicd.t5 import T5, T5Config, initialise
from minicd.tasks.parts.addition_questions import draw_questions, teacher_template
from minicd.training import FitSettings, Run

Rows = list[list[int]]
PROMPT, ANSWER = 21, 10  # tokens of an example
BASE = ROOT / "data" / "pocket"
PRACTISED = 512  # scratchpads
SMALL = T5Config(vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_heads=6, num_layers=8,
                 dropout_rate=0.0, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
# A model and one turn's work: training steps and their batch; questions to label and tokens for each.
SHAPES = {"pocket": Shape(config=pocket_config(104), batch=128, steps=10, prompts=512, new_tokens=75),
          "T5-small v1.1": Shape(config=SMALL, batch=16, steps=2, prompts=64, new_tokens=20)}


def batch(config: T5Config, size: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, LabelBatch]:
    """Random prompts [size, PROMPT] and hard labels of random answers [size, ANSWER]."""
    generator = torch.Generator().manual_seed(0)
    prompts, answers = (torch.randint(3, config.vocab_size, (size, n), generator=generator)
                        for n in (PROMPT, ANSWER))
    mask = torch.ones(size, ANSWER, dtype=torch.bool)
    labels = LabelBatch(answers, answers[..., None], torch.ones(size, ANSWER, 1), mask)
    return prompts.to(device), labels.to(device)


def pair(model: T5, tokenizer, device: torch.device) -> tuple[T5, Any]:
    """The model and transformers' of the same weights. Raises ValueError if their fp32 losses differ."""
    transformers = import_transformers()
    with tempfile.TemporaryDirectory() as folder:
        save(model, tokenizer, folder)
        other = transformers.T5ForConditionalGeneration.from_pretrained(folder).to(device).eval()
    prompts, labels = batch(model.to(device).eval().config, 4, device)
    with torch.no_grad():
        logits, everything = model(prompts, labels.tokens), torch.ones_like(prompts)
        ours = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.tokens.flatten()).item()
        theirs = other(input_ids=prompts, attention_mask=everything, labels=labels.tokens).loss.item()
    if not abs(ours - theirs) < 1e-3:
        raise ValueError(f"these are two different models: loss {ours:.5f} in minicd, "
                         f"{theirs:.5f} in transformers")
    return model, other


def our_updates(model: T5, data, steps: int, precision: str) -> Callable[[], None]:
    """Training steps as `fit` makes them: forward, loss, backward, AdamW."""
    run = Run(model.train(), FitSettings(lr=1e-4, loss="hard", precision=precision), 10**9, 0, None)
    return lambda: [run.update(*data) for _ in range(steps)] and None


def their_updates(model, data, steps: int, precision: str) -> Callable[[], None]:
    """The same with transformers: its own loss, the same optimiser."""
    prompts, labels = data
    optimiser = torch.optim.AdamW(model.train().parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def updates() -> None:
        for _ in range(steps):
            with autocast(prompts.device, precision):
                mask = torch.ones_like(prompts)
                loss = model(input_ids=prompts, attention_mask=mask, labels=labels.tokens).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    return updates


def our_labels(model: T5, prompts: Rows, tokens: int, temperature: float, precision: str) -> Rows:
    return sampling.generate(model, prompts, tokens, temperature, batch_size=len(prompts),
                             precision=precision)


def their_labels(model, stop: int | None, prompts: Rows, tokens: int, temperature: float,
                 precision: str) -> Rows:
    """transformers' generate. `stop`: the token that ends a completion, or None to write all tokens."""
    how = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else dict(do_sample=False)
    ids = sampling.pad(prompts, 0).to(model.device)
    with autocast(model.device, precision), torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=ids != 0, max_new_tokens=tokens,
                             eos_token_id=stop, **how)
    return [row[: row.index(stop)] if stop in row else row for row in out[:, 1:].tolist()]


def compare(name: str, shape: Shape, precision: str, arguments) -> list[dict[str, Any]]:
    """Labelling with a fixed number of new tokens, then training, of one shape in one precision."""
    ours, theirs = pair(initialise(T5(shape.config), 0), pocket_tokenizer(), arguments.device)
    ours.config = replace(ours.config, eos_token_id=shape.config.vocab_size)  # no such token: no row stops
    how = batch(shape.config, shape.prompts)[0].tolist(), shape.new_tokens, arguments.temperature, precision
    label = turns(f"{name}, {precision}: answers written/s", shape.prompts, arguments,
                  minicd=partial(our_labels, ours, *how),
                  transformers=partial(their_labels, theirs, None, *how))
    how = batch(shape.config, shape.batch, arguments.device), shape.steps, precision
    return [label, turns(f"{name}, {precision}: examples trained/s", shape.batch * shape.steps, arguments,
                         minicd=our_updates(ours, *how), transformers=their_updates(theirs, *how))]


def scratchpads(precision: str, arguments) -> list[dict[str, Any]]:
    """Practice by a trained model: a teacher adds, or the base does its made-up operations."""
    model, tokenizer = load(arguments.model or BASE, arguments.device)
    questions = draw_questions(PRACTISED, 8, "test", np.random.default_rng(0))
    texts = ([teacher_template(q) for q in questions] if arguments.model else
             [operation(rng, rng.randint(1, 8))[0] for rng in map(random.Random, range(PRACTISED))])
    ours, theirs = pair(model, tokenizer, arguments.device)
    context = Context(lambda n, rng: texts, str, str, identity)
    settings = PracticeSettings(max_new_tokens=90, precision=precision)
    return [turns(f"pocket scratchpads, {precision}: practised/s", len(texts), arguments,
                  minicd=lambda: practice(ours, tokenizer, context, len(texts), settings) and None,
                  transformers=lambda: their_practice(theirs, tokenizer, texts, settings))]


def their_practice(model, tokenizer, texts: list[str], settings: PracticeSettings) -> None:
    """The same steps with transformers: sample, score what was written, draw the labels of its tokens."""
    prompts = tokenizer.encode_all(texts)
    answers = their_labels(model, tokenizer.eos_id, prompts, settings.max_new_tokens, settings.temperature,
                           settings.precision)
    answers = [[*answer, tokenizer.eos_id] for answer in answers]
    ids, labels = (sampling.pad(rows, 0).to(model.device) for rows in (prompts, answers))
    with autocast(model.device, settings.precision), torch.no_grad():
        logits = model(input_ids=ids, attention_mask=ids != 0, labels=labels).logits[labels != 0]
    torch.multinomial(logits.float().softmax(-1), settings.label_samples, replacement=True)


def compiled(name: str, shape: Shape, precision: str, arguments) -> list[dict[str, Any]]:
    """minicd's training step under torch.compile and as it is; the first turn is the start-up."""
    how = batch(shape.config, shape.batch, arguments.device), shape.steps, precision
    fast, plain = (initialise(T5(shape.config), 0).to(arguments.device) for _ in range(2))
    fast.compile()
    return [turns(f"{name}, {precision}: examples trained/s", shape.batch * shape.steps, arguments,
                  compiled=our_updates(fast, *how), plain=our_updates(plain, *how))]


def temperature(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return float(text)


def parse() -> Any:
    parser = Parser("Training and labelling speed against Hugging Face transformers.")
    for flag, choices in (("--precision", ["fp32", "bf16"]), ("--shape", list(SHAPES))):
        parser.add_argument(flag, choices=choices, action="append", help="only this one")
    parser.add_argument("--rounds", type=count, default=5, help="timed turns of each side")
    parser.add_argument("--temperature", type=temperature, default=0.0, help="of the labelling; 0: greedy")
    parser.add_argument("--model", help="a trained teacher, for the scratchpad rows (default: data/pocket)")
    parser.add_argument("--compile", action="store_true",
                        help="instead: train with and without torch.compile")
    return parsed(parser, "bench-train")


def main() -> None:
    arguments = parse()
    names, results = arguments.shape or list(SHAPES), []
    both = isinstance(autocast(arguments.device), torch.autocast)  # bf16 is fast here
    for precision in arguments.precision or ["fp32", "bf16"][: 1 + both]:
        for name in names:
            results += (compiled if arguments.compile else compare)(name, SHAPES[name], precision, arguments)
        if not arguments.compile and "pocket" in names and (arguments.model or BASE.exists()):
            results += scratchpads(precision, arguments)
    settings = {"prompt_tokens": PROMPT, "answer_tokens": ANSWER,
                **{key: getattr(arguments, key) for key in ("rounds", "temperature", "cpu_time", "model")}}
    settings["shapes"] = {name: {**vars(SHAPES[name]), "config": asdict(SHAPES[name].config)}
                          for name in names}
    publish(arguments.out, arguments.device, settings, results,
            transformers=None if arguments.compile else import_transformers().__version__)


if __name__ == "__main__":
    guarded(main)
