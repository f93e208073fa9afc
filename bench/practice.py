"""Ways to practise, side by side: who writes the answers, who teaches, and with which labels.

    python -m bench.practice    # from the repository's root; three seeds, ten minutes on two CPU cores

Two contexts on the pocket base, whose student sees `task : LIST` in both. The teacher of *shared rule* is
told to reverse every list: one rule for all inputs, which the student can learn. The teacher of
*instance-specific* is told a rule for each list, one of four, which nothing in the student's prompt gives
away: the best that a student can do is to be as undecided as the rules are. All ways take as many steps with
batches of the same size.
"""

from __future__ import annotations

import time
import zlib
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor, nn

from bench.common import ROOT, Parser, count, guarded, parsed, publish, seed_number
from minicd.distill import Answer, Context, PracticeSettings, identity, practice
from minicd.hf.checkpoint import load
from minicd.labels import LabelBatch, SoftLabels
from minicd.metrics import exact_match
from minicd.rounds import OnPolicy
from minicd.sampling import generate, score
from minicd.tasks.parts.own_forgetting import forgotten
from minicd.tasks.parts.own_measures import along_teacher, teacher_answers
from minicd.tokenizer import TextTokenizer
from minicd.training import Epochs, FitSettings, fit

RULES: dict[str, Callable[[list[str]], list[str]]] = {
    "reverse": lambda x: x[::-1], "copy": lambda x: x, "rest": lambda x: x[1:], "most": lambda x: x[:-1]}
UNRELATED = [f"{task} : {a} | {b}" for task in ("join", "zip", "columns", "max", "min")
             for a, b in (("a c", "d b"), ("g e f", "a h b"), ("3 1", "2 7"), ("9 4 6", "5 0 8"))]
HELD_OUT, LONGEST, TOP, DECAY = 200, 12, 16, 0.98  # lists to test, tokens, of a top label, of the average
GREEDY = SimpleNamespace(max_new_tokens=LONGEST, precision=None)  # how the measures let models answer


@dataclass(frozen=True)
class Way:
    """One row: the loss, its labels, the share of batches that the student writes, and who teaches these."""

    loss: str = "empirical"
    labels: str = "sampled"
    share: float = 0.0
    teacher: str = "base"  # live: the student of that moment under T_t; average: a moving average of it
    top_of: str = "teacher"  # whose likeliest tokens a top label names


WAYS = {"teacher writes, 100 samples (the paper)": Way(),
        f"teacher writes, its top {TOP}": Way("topk", "top"),
        "teacher writes, exact labels": Way("exact", "exact"),
        "teacher writes, its text alone (supervised)": Way("hard"),
        "half and half, forward, exact": Way("exact", "exact", 0.5),
        "half and half, reverse, exact": Way("reverse", "exact", 0.5),
        "student writes, forward, exact": Way("exact", "exact", 1.0),
        "student writes, reverse, exact": Way("reverse", "exact", 1.0),
        f"student writes, reverse, the teacher's top {TOP}": Way("reverse", "top", 1.0),
        f"student writes, reverse, the student's top {TOP}": Way("reverse", "top", 1.0, top_of="student"),
        "student writes, reverse, exact; teacher live": Way("reverse", "exact", 1.0, "live"),
        "student writes, reverse, exact; teacher an average": Way("reverse", "exact", 1.0, "average")}


# --- the two contexts ---


def rule_of(kind: str, text: str) -> str:
    """The rule for this list: the same for all, or one that a hash chooses."""
    return "reverse" if kind == "shared rule" else list(RULES)[zlib.crc32(text.encode()) % len(RULES)]


def reference(kind: str, text: str) -> str:
    return " ".join(RULES[rule_of(kind, text)](text.split()))


def lists(n: int, rng: np.random.Generator) -> list[str]:
    """n lists of 4 to 8 letters."""
    return [" ".join(rng.choice(list("abcdefgh"), size=rng.integers(4, 9))) for _ in range(n)]


def make_context(kind: str, tests: list[str]) -> Context:
    """Practice draws no list that is tested."""
    tested = set(tests)

    def inputs(n: int, rng: np.random.Generator) -> list[str]:
        found: list[str] = []
        while len(found) < n:
            found += [text for text in lists(n, rng) if text not in tested]
        return found[:n]
    return Context(inputs, lambda x: f"{rule_of(kind, x)} : {x}", lambda x: f"task : {x}", identity)


# --- the ways ---


class Written(OnPolicy):
    """Batches that the student writes; counts what the teacher reads and, if asked, follows the student."""

    def __init__(self, way: Way, spent: Counter, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        self.way, self.spent = way, spent

    def __getitem__(self, step: int) -> tuple[Tensor, LabelBatch]:
        if self.way.teacher == "average":
            for mean, now in zip(self.teacher.parameters(), self.student.parameters()):
                mean.data.lerp_(now.data, 1 - DECAY)
        return super().__getitem__(step)

    def soft_labels(self, logits: Tensor, prompts: list[list[int]], answers: list[list[int]],
                    generator: torch.Generator) -> SoftLabels:
        self.spent["answers"] += len(logits)
        if self.way.top_of == "teacher":
            return super().soft_labels(logits, prompts, answers, generator)
        own = torch.cat(score(self.student, prompts, answers, precision=self.settings.precision))
        ids = own.topk(TOP).indices
        return SoftLabels.of_probabilities(ids, logits.float().softmax(-1).gather(-1, ids))


class Mixed:
    """Each batch is with probability λ = `share` written by the student (Agarwal et al., 2024)."""

    def __init__(self, fixed: Epochs | None, written: Written, share: float):
        self.fixed, self.written, self.share = fixed, written, share

    def __len__(self) -> int:
        return len(self.written)

    def __getitem__(self, step: int) -> tuple[Tensor, LabelBatch]:
        ours = np.random.default_rng((self.written.seed, step, 1)).random() < self.share
        return self.written[step] if ours else self.fixed[step]


def counted(context: Context, tokenizer: TextTokenizer, spent: Counter) -> Context:
    """The same context, which counts the tokens of the teacher's prompts."""
    def teacher(x: str) -> str:
        spent["prompts"] += len(tokenizer.encode(context.teacher(x)))
        return context.teacher(x)
    return replace(context, teacher=teacher)


def train(way: Way, base: nn.Module, tokenizer: TextTokenizer, context: Context, seed: int,
          arguments: Any) -> tuple[nn.Module, int]:
    """The student of this way, and how many tokens its teacher read or wrote."""
    student, spent = deepcopy(base), Counter()
    context = counted(context, tokenizer, spent)
    how = PracticeSettings(way.labels, label_top=TOP, max_new_tokens=LONGEST)
    size, fixed = arguments.batch_size, None
    if way.share < 1:
        items = practice(base, tokenizer, context, arguments.inputs, how, seed=seed)
        spent["answers"] += len(items.answers.values)
        fixed = Epochs(items, size, arguments.steps * size / len(items), seed, base.config.pad_token_id)
    teacher = {"base": base, "live": student}.get(way.teacher) or deepcopy(base)
    written = Written(way, spent, student, teacher, tokenizer, context, how, steps=arguments.steps,
                      batch_size=size, seed=seed)
    batches = Mixed(fixed, written, way.share) if way.share else fixed
    fit(student, batches, FitSettings(loss=way.loss, lr=arguments.lr), seed=seed)
    return student, spent.total()


# --- figures ---


def figures(student: nn.Module, base: nn.Module, tokenizer: TextTokenizer, kind: str, context: Context,
            tests: list[str], taught: list[Answer | None]) -> dict[str, float]:
    """Exact answers in percent, KL(teacher ‖ student) and forgetting in 1/1000 nat a token.

    `taught`: the teacher's greedy answers to the tests.
    """
    found = along_teacher(base, student, tokenizer, context, tests, taught, GREEDY)
    asked = tokenizer.encode_all(list(map(context.student, tests)))
    written = map(tokenizer.decode, generate(student, asked, LONGEST, 0))
    right = [exact_match(ours, reference(kind, x)) for ours, x in zip(written, tests)]
    return {"quality": round(100 * float(np.mean(right)), 1), "kl": round(found["kl"][0], 1),
            "forgotten": round(forgotten(base, student, tokenizer, UNRELATED, GREEDY)["forgotten"][0], 1)}


def measure(kind: str, base: nn.Module, tokenizer: TextTokenizer, arguments: Any) -> dict[str, Any]:
    """All ways on one context: name → the figures of each seed."""
    tests = list(dict.fromkeys(lists(2 * HELD_OUT, np.random.default_rng(12345))))[:HELD_OUT]
    context = make_context(kind, tests)
    taught = teacher_answers(base, tokenizer, context, tests, GREEDY)
    rows = {"not trained": [figures(base, base, tokenizer, kind, context, tests, taught)]}
    print(f"{kind}: not trained {rows['not trained'][0]}", flush=True)
    for name, way in WAYS.items():
        rows[name] = []
        for seed in arguments.seeds:
            start = time.perf_counter()
            student, spent = train(way, base, tokenizer, context, seed, arguments)
            minutes = (time.perf_counter() - start) / 60
            rows[name].append({**figures(student, base, tokenizer, kind, context, tests, taught),
                               "thousand_tokens": round(spent / 1000, 1), "minutes": round(minutes, 2)})
            print(f"{kind}: {name}, seed {seed}: {rows[name][-1]}", flush=True)
    return {"context": kind, "ways": rows}


def parse() -> Any:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", type=Path, default=ROOT / "data" / "pocket", help="folder of the base")
    parser.add_argument("--inputs", type=count, default=1024, help="that the teacher answers in advance")
    parser.add_argument("--steps", type=count, default=48, help="of the optimiser")
    parser.add_argument("--batch-size", type=count, default=32, help="answers of a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    return parsed(parser, "bench-practice")


def main() -> None:
    arguments, start = parse(), time.monotonic()
    base, tokenizer = load(arguments.model, arguments.device)
    results = [measure(kind, base, tokenizer, arguments) for kind in ("shared rule", "instance-specific")]
    settings = {"inputs": arguments.inputs, "steps": arguments.steps, "batch_size": arguments.batch_size,
                "lr": arguments.lr}
    publish(arguments.out, arguments.device, settings, results, seeds=arguments.seeds,
            minutes=round((time.monotonic() - start) / 60, 2))


if __name__ == "__main__":
    guarded(main)
