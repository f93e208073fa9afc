"""Training and labelling speed: minicd against Hugging Face transformers' T5 with the same weights on the same batches.

    pip install transformers                         # needed by this benchmark only
    OMP_NUM_THREADS=1 python -m bench.train          # from the repository's root; about 5 minutes on a free CPU core
    python -m bench.train --device cuda
    OMP_NUM_THREADS=1 python -m bench.train --compile --out results/bench-compile.json   # needs no transformers

Prints a table, writes results/bench-train.json. Both sides take turns in one process; a figure is the median over the
rounds, after one untimed turn each. Before that both must compute the same loss, and the record has the share of greedy
completions that were the same. Random weights never stop by themselves, so both write a fixed number of tokens; the rows
"pocket scratchpads" are a trained model with the stop rule on. --compile is minicd's training step under torch.compile.
"""

from __future__ import annotations

import os
import random
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minicd import sampling
from minicd.checkpoint import load, save
from minicd.commands import Parser, guarded
from minicd.device import autocast, hardware, pick_device
from minicd.experiment import COMMIT, ROOT
from minicd.files import atomic_json
from minicd.labels import LabelBatch
from minicd.t5 import T5, T5Config, initialise
from minicd.tasks.addition_questions import draw_questions, teacher_template
from minicd.tasks.pocket import operation, pocket_config, pocket_tokenizer
from minicd.training import FitSettings, Run

PROMPT, ANSWER = 21, 10  # tokens of an example
BASE = ROOT / "data" / "pocket"


@dataclass
class Shape:
    """A model, and how much work one turn is."""

    config: T5Config
    batch: int  # examples in a training step
    steps: int  # training steps a turn
    prompts: int  # questions labelled at a time
    new_tokens: int  # written for each


SMALL = T5Config(vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_heads=6, num_layers=8, dropout_rate=0.0,
                 feed_forward_proj="gated-gelu", tie_word_embeddings=False)
SHAPES = {"pocket": Shape(pocket_config(104), batch=128, steps=20, prompts=512, new_tokens=75),
          "T5-small v1.1": Shape(SMALL, batch=16, steps=2, prompts=64, new_tokens=20)}


def batch(config: T5Config, size: int, device: torch.device | str = "cpu") -> tuple[Tensor, LabelBatch]:
    """Random prompts [size, PROMPT] and hard labels of random answers [size, ANSWER]."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, config.vocab_size, (size, PROMPT), generator=generator)
    answers = torch.randint(3, config.vocab_size, (size, ANSWER), generator=generator)
    labels = LabelBatch(answers, answers[..., None], torch.ones(size, ANSWER, 1), torch.ones(size, ANSWER, dtype=torch.bool))
    return prompts.to(device), labels.to(device)


def pair(model: T5, tokenizer, device: torch.device) -> tuple[T5, Any]:
    """The model and transformers' model of the same weights. Raises ValueError where their losses differ (in fp32)."""
    from transformers import T5ForConditionalGeneration
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save(model, tokenizer, folder)
        other = T5ForConditionalGeneration.from_pretrained(folder).to(device).eval()
    model, (prompts, labels) = model.to(device).eval(), batch(model.config, 4, device)
    with torch.no_grad():
        ours = F.cross_entropy(model(prompts, labels.tokens).flatten(0, 1), labels.tokens.flatten()).item()
        theirs = other(input_ids=prompts, attention_mask=torch.ones_like(prompts), labels=labels.tokens).loss.item()
    if not abs(ours - theirs) < 1e-3:
        raise ValueError(f"these are two different models: loss {ours:.5f} in minicd, {theirs:.5f} in transformers")
    return model, other


def our_updates(model: T5, data, steps: int, precision: str) -> Callable[[], None]:
    """Training steps as `fit` makes them: forward, loss, backward, AdamW."""
    run = Run(model.train(), FitSettings(lr=1e-4, loss="hard", precision=precision), 10**9, 0, None)
    return lambda: [run.update(*data) for _ in range(steps)] and None


def their_updates(model, data, steps: int, precision: str) -> Callable[[], None]:
    """The same with transformers: its own loss, the same optimiser."""
    (prompts, labels), optimiser = data, torch.optim.AdamW(model.train().parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def updates() -> None:
        for _ in range(steps):
            with autocast(prompts.device, precision):
                loss = model(input_ids=prompts, attention_mask=torch.ones_like(prompts), labels=labels.tokens).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    return updates


def our_labels(model: T5, prompts: list[list[int]], tokens: int, temperature: float, precision: str) -> list[list[int]]:
    with mock.patch.object(sampling, "autocast", partial(autocast, precision=precision)):
        return sampling.generate(model, prompts, tokens, temperature, batch_size=len(prompts))


def their_labels(model, stop: int | None, prompts: list, tokens: int, temperature: float, precision: str) -> list[list[int]]:
    """transformers' generate; stop: the token that ends a completion, or None to write all tokens."""
    how = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else dict(do_sample=False)
    ids = sampling.pad(prompts, 0).to(model.device)
    with autocast(model.device, precision), torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=ids != 0, max_new_tokens=tokens, eos_token_id=stop, **how)
    return [row[: row.index(stop)] if stop in row else row for row in out[:, 1:].tolist()]


def timed(side: Callable, device: torch.device) -> tuple[float, Any]:
    """Seconds, and what it returned."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    value = side()
    wait()
    return time.perf_counter() - start, value


def turns(what: str, work: int, sides: dict[str, Callable], arguments) -> dict[str, Any]:
    """Time two sides in turn: work per second in every round, medians, the first's median ÷ the second's."""
    a, b = sides
    first = {name: timed(side, arguments.device) for name, side in sides.items()}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, side in sides.items():
            rates[name].append(round(work / timed(side, arguments.device)[0], 1))
    median = {name: statistics.median(values) for name, values in rates.items()}
    result = {"what": what, "median": median, "ratio": round(median[a] / median[b], 2), "rounds": rates,
              "first_turn_seconds": {name: round(seconds, 2) for name, (seconds, _) in first.items()}}
    if first[a][1]:  # completions
        result["same_completions"] = round(statistics.mean(map(list.__eq__, first[a][1], first[b][1])), 3)
    print(f"{what:46} {median[a]:9.1f} {median[b]:13.1f} {result['ratio']:6.2f} {first[a][0]:9.1f} s", flush=True)
    return result


def compare(name: str, shape: Shape, precision: str, arguments) -> list[dict[str, Any]]:
    """Labelling with a fixed number of new tokens, then training, of one shape in one precision."""
    ours, theirs = pair(initialise(T5(shape.config), 0), pocket_tokenizer(), arguments.device)
    ours.config = replace(ours.config, eos_token_id=shape.config.vocab_size)  # no such token: no row stops
    how = batch(shape.config, shape.prompts)[0].tolist(), shape.new_tokens, arguments.temperature, precision
    sides = {"minicd": partial(our_labels, ours, *how), "transformers": partial(their_labels, theirs, None, *how)}
    label = turns(f"{name}, {precision}: questions labelled/s", shape.prompts, sides, arguments)
    how = batch(shape.config, shape.batch, arguments.device), shape.steps, precision
    sides = {"minicd": our_updates(ours, *how), "transformers": their_updates(theirs, *how)}
    return [label, turns(f"{name}, {precision}: examples trained/s", shape.batch * shape.steps, sides, arguments)]


def scratchpads(precision: str, arguments) -> list[dict[str, Any]]:
    """Labelling by a trained model that stops: a teacher adds, or the base works its made-up operations out."""
    model, tokenizer = load(arguments.model or BASE, arguments.device)
    texts = [operation(rng, rng.randint(1, 8))[0] for rng in map(random.Random, range(512))]
    if arguments.model:
        texts = [teacher_template(q) for q in draw_questions(512, 8, "test", np.random.default_rng(0))]
    ours, theirs = pair(model, tokenizer, arguments.device)
    how = tokenizer.encode_all(texts), 90, arguments.temperature, precision
    sides = {"minicd": partial(our_labels, ours, *how), "transformers": partial(their_labels, theirs, tokenizer.eos_id, *how)}
    return [turns(f"pocket scratchpads, {precision}: labelled/s", len(texts), sides, arguments)]


def compiled(name: str, shape: Shape, precision: str, arguments) -> list[dict[str, Any]]:
    """minicd's training step under torch.compile and as it is; the first turn is the start-up."""
    models = {side: initialise(T5(shape.config), 0).to(arguments.device) for side in ("compiled", "plain")}
    models["compiled"].compile()
    data = batch(shape.config, shape.batch, arguments.device)
    sides = {side: our_updates(model, data, shape.steps, precision) for side, model in models.items()}
    return [turns(f"{name}, {precision}: examples trained/s", shape.batch * shape.steps, sides, arguments)]


def measure(arguments) -> list[dict[str, Any]]:
    """All rows: each precision that is fast here, each shape."""
    bf16, results = isinstance(autocast(arguments.device), torch.autocast), []
    for precision in arguments.precision or (["fp32", "bf16"] if bf16 else ["fp32"]):
        for name in arguments.shape or SHAPES:
            results += (compiled if arguments.compile else compare)(name, SHAPES[name], precision, arguments)
        if not arguments.compile and (arguments.model or BASE.exists()):
            results += scratchpads(precision, arguments)
    return results


def parse() -> Any:
    parser = Parser("Training and labelling speed against Hugging Face transformers.")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", choices=["fp32", "bf16"], action="append", help="only this one")
    parser.add_argument("--shape", choices=list(SHAPES), action="append", help="only this one")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each side")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the labelling; 0: greedy")
    parser.add_argument("--model", help="a trained teacher's folder, for the scratchpad rows (default: data/pocket, if there)")
    parser.add_argument("--compile", action="store_true", help="minicd's training step with and without torch.compile instead")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench-train.json", help="the record")
    arguments = parser.parse_args()
    arguments.device = pick_device(arguments.device)
    return arguments


def version(arguments) -> str | None:
    try:
        return None if arguments.compile else __import__("transformers").__version__
    except ImportError:
        raise ValueError("this compares with Hugging Face transformers, which is missing: pip install transformers") from None


def main() -> None:
    arguments = parse()
    record = {"task": "bench", "scale": arguments.out.stem.removeprefix("bench-"), "commit": COMMIT,
              "command": " ".join(["python -m bench.train", *map(shlex.quote, sys.argv[1:])]),
              "hardware": hardware(arguments.device), "threads": torch.get_num_threads(), "load_average": os.getloadavg()[0],
              "torch": torch.__version__, "transformers": version(arguments),
              "settings": {"temperature": arguments.temperature, "rounds": arguments.rounds, "prompt_tokens": PROMPT,
                           "answer_tokens": ANSWER, "shapes": {name: asdict(shape) for name, shape in SHAPES.items()}}}
    print(f"{'':46} " + ("compiled         plain" if arguments.compile else "  minicd  transformers") + "  ratio  first turn")
    atomic_json(arguments.out, {**record, "results": measure(arguments)})


if __name__ == "__main__":
    guarded(main)
