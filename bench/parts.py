"""What the losses cost when the logits [B, T, V] are computed by parts, beside the whole logits.

    OMP_NUM_THREADS=1 python -m bench.parts   # from the repository's root; a minute on a CPU core, 3 GB
    python -m bench.parts --vocabulary 32128 --tokens 2560 --out one.json

A head on given states [B, T, d] stands for a model: `loss_per_token` (minicd/runtime/lean.py) computes head
and loss, forward and backward, as in training. Peak memory is what that allocates beside states, head, their
gradients, and labels. The divergences have the teacher's likeliest tokens as labels. By parts nothing of size
[B, T, V] is ever in memory, unless the labels are it themselves: an exact label names all V tokens, with 12
bytes each, so that a batch of them is three times as large as its logits in fp32, however these are computed.
"""

from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace
from typing import Any, Callable

import torch
from torch import Tensor, nn

import minicd.runtime.lean as lean
from bench.common import Parser, count, guarded, parsed, publish
from bench.labels import MIB, NAMES, batch, cpu_peak, cuda_peak, timed
from minicd.distill import PracticeSettings, soft_labels
from minicd.layers import Embedding
from minicd.losses import find_loss, mean_over_tokens

KINDS = {"empirical": "sampled", "hard": "sampled", "topk": "top", "reverse": "top", "jsd": "top"}  # labels
ROW = 32  # tokens of an answer


class Head(nn.Module):
    """The end of a model: states, which are parameters here, times the embeddings of all tokens."""

    def __init__(self, vocabulary: int, width: int, tokens: int, generator: torch.Generator):
        super().__init__()
        how = {"generator": generator, "device": generator.device}
        self.config, self.tokens = SimpleNamespace(vocab_size=vocabulary, pad_token_id=0), Embedding(1, 1)
        self.tokens.weight = nn.Parameter(torch.randn(vocabulary, width, **how))
        self.states = nn.Parameter(torch.randn(tokens // ROW, ROW, width, **how) * 4 * width**-0.5)

    def forward(self, prompts: Tensor, answers: Tensor) -> Tensor:
        return self.head(self.states)

    def head(self, x: Tensor) -> Tensor:
        return self.tokens.head(x)


def training(model: Head, labels: Any, loss: Callable, at_once: int) -> None:
    """Forward and backward, with at most so many logits of a batch at once."""
    usual, lean.LOGITS_AT_ONCE = lean.LOGITS_AT_ONCE, at_once
    try:
        model.zero_grad(set_to_none=False)
        mean_over_tokens(lean.loss_per_token(model, labels.tokens, labels, loss), labels.mask).backward()
    finally:
        lean.LOGITS_AT_ONCE = usual


def costs(model: Head, labels: Any, name: str, arguments) -> dict[str, float]:
    """Peak MiB and milliseconds of the loss, on the whole logits and by parts, and the quotients."""
    found, peak = {}, cuda_peak if arguments.device.type == "cuda" else cpu_peak
    for how, at_once in ("whole", 2**62), ("parts", 0):
        step = partial(training, model, labels, find_loss(name), at_once)
        step()  # then the gradients are there
        found[f"{how}_mib"] = round(peak(step) / MIB, 1)
        found[f"{how}_ms"] = round(1000 * timed(step, arguments), 1)
    found |= {"memory": round(found["parts_mib"] / found["whole_mib"], 3),
              "time": round(found["parts_ms"] / found["whole_ms"], 2)}
    print(f"    {name:9} {found['whole_mib']:8.1f} → {found['parts_mib']:6.1f} MiB ({found['memory']:.3f}), "
          f"{found['whole_ms']:7.1f} → {found['parts_ms']:7.1f} ms ({found['time']:.2f})", flush=True)
    return found


def measure(vocabulary: int, arguments) -> dict[str, Any]:
    """All losses at one vocabulary."""
    print(f"vocabulary {vocabulary:,}, {arguments.tokens} tokens, width {arguments.width}", flush=True)
    generator = torch.Generator(arguments.device).manual_seed(0)
    model = Head(vocabulary, arguments.width, arguments.tokens, generator)
    with torch.no_grad():
        teacher = model(None, None).flatten(0, 1)
        tokens = teacher.argmax(-1).view(-1, ROW)
        made = {kind: batch(soft_labels(teacher, PracticeSettings(labels=kind), generator), tokens)
                for kind in ("sampled", "top")}
    del teacher
    losses = {name: costs(model, made[kind], name, arguments) for name, kind in KINDS.items()}
    return {"vocabulary": vocabulary, "model": NAMES.get(vocabulary, ""), "losses": losses}


def parse() -> Any:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=count, default=151936, help="its size")
    parser.add_argument("--tokens", type=count, default=512, help=f"of a batch, a multiple of {ROW}")
    parser.add_argument("--width", type=count, default=256, help="of the states")
    parser.add_argument("--rounds", type=count, default=3, help="timed passes of each loss")
    arguments = parsed(parser, "bench-parts")
    if arguments.tokens % ROW:
        raise ValueError(f"--tokens {arguments.tokens} is not a multiple of {ROW}")
    return arguments


def main() -> None:
    arguments, start = parse(), time.monotonic()
    results = [measure(arguments.vocabulary, arguments)]
    settings = {"tokens": arguments.tokens, "width": arguments.width, "part": lean.PART,
                "rounds": arguments.rounds, "cpu_time": arguments.cpu_time}
    publish(arguments.out, arguments.device, settings, results,
            minutes=round((time.monotonic() - start) / 60, 2))


if __name__ == "__main__":
    guarded(main)
