"""The real model, SmolLM2-135M, in minicd and in Hugging Face transformers: training, sampling, practice.

    pip install transformers gguf && python data/smollm2.py
    python -m bench.real                     # on an otherwise idle machine; about 30 minutes on two CPU cores
    python -m bench.real --precision bf16 --only practised

Both sides have the same weights and take turns in one process; a figure is the median over the rounds, after
one untimed turn each. Their losses on the first batch must agree. transformers generates with its dynamic or
its static cache, whichever was faster in a first turn. "Practised" is sampling an answer to each prompt and
100 draws from the teacher's distribution at each of its tokens; the H1 prompts share an instruction.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any, Callable

import torch
import torch.nn.functional as F

from bench.common import ROOT, Parser, count, guarded, import_transformers, parsed, publish, turns
from bench.train import our_updates
from minicd import Context, PracticeSettings, identity, load, practice
from minicd.labels import LabelBatch
from minicd.runtime.device import autocast
from minicd.runtime.memory import keep_memory

MODEL = ROOT / "data" / "smollm2"
# Title → examples, tokens of the prompt, of which the first ones are the same in all, and of the answer: a
# batch of scratchpads, one of direct answers, one of H1, one of questions below a schema
TRAINED = {"scratchpads": (16, 22, 5, 60), "direct answers": (32, 20, 5, 9), "instructions": (16, 60, 0, 12),
           "queries": (8, 220, 200, 30)}
# Title → prompts, their tokens, of which at the beginning the same in all, and new tokens
PRACTISED = {"addition": (128, 22, 5, 40), "instructions": (64, 440, 400, 16)}
Rows = list[list[int]]


def random_rows(size: int, length: int, shared: int = 0, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(100, 40_000, (size, length), generator=generator)
    rows[:, :shared] = rows[0, :shared]
    return rows.tolist()


def training_batch(size: int, prompt: int, shared: int, answer: int, device: Any = "cpu"
                   ) -> tuple[torch.Tensor, LabelBatch]:
    prompts = torch.tensor(random_rows(size, prompt, shared, seed=prompt))
    answers = torch.tensor(random_rows(size, answer, seed=answer))
    mask = torch.ones_like(answers, dtype=torch.bool)
    labels = LabelBatch(answers, answers[..., None], torch.ones(size, answer, 1), mask)
    return prompts.to(device), labels.to(device)


def their_loss(model: Any, prompts: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """transformers' own loss of the answers; its labels -100 are ignored."""
    labels = torch.cat([torch.full_like(prompts, -100), answers], dim=1)
    return model(torch.cat([prompts, answers], dim=1), labels=labels).loss


def their_updates(model: Any, data: tuple, precision: str) -> Callable[[], None]:
    """A plain training loop with the same optimiser."""
    optimiser = torch.optim.AdamW(model.train().parameters(), lr=1e-6, weight_decay=0.0, fused=True)

    def update() -> None:
        with autocast(data[0].device, precision):
            loss = their_loss(model, data[0], data[1].tokens)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return update


def check_same(ours: Any, theirs: Any) -> None:
    """Raises ValueError where the two models have different losses."""
    prompts, labels = training_batch(2, 20, 0, 10, theirs.device)
    with torch.no_grad():
        logits = ours.eval()(prompts, labels.tokens).flatten(0, 1)
        loss = F.cross_entropy(logits, labels.tokens.flatten())
        other = their_loss(theirs.eval(), prompts, labels.tokens)
    if not abs(loss - other) < 1e-3:
        raise ValueError(f"these are two different models: loss {loss:.5f} and {other:.5f}")


@torch.no_grad()
def their_completions(model: Any, prompts: Rows, new: int, precision: str, cache: str | None) -> torch.Tensor:
    ids = torch.tensor(prompts, device=model.device)
    with autocast(ids.device, precision):
        return model.eval().generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0,
            max_new_tokens=new, eos_token_id=None, pad_token_id=0, cache_implementation=cache)


def faster_cache(model: Any, prompts: Rows, new: int, precision: str) -> str | None:
    """None, the dynamic one, or static."""
    def seconds(cache: str | None) -> float:
        start = time.perf_counter()
        their_completions(model, prompts, new, precision, cache)
        return time.perf_counter() - start
    return min((None, "static"), key=seconds)


@torch.no_grad()
def their_practice(model: Any, prompts: Rows, new: int, precision: str, cache: str | None) -> None:
    """Sample, read what was written again for its logits, draw 100 tokens from each."""
    written = their_completions(model, prompts, new, precision, cache)
    with autocast(written.device, precision):
        logits = model(written, logits_to_keep=new + 1).logits[:, :-1]
    torch.multinomial(logits.flatten(0, 1).float().softmax(-1), 100, replacement=True)


def our_practice(model: Any, prompts: Rows, new: int, precision: str) -> None:
    """`practice` itself, on the token ids of the prompts."""
    texts = {str(i): prompt for i, prompt in enumerate(prompts)}
    context = Context(lambda n, rng: list(texts), str, str, identity)
    settings = PracticeSettings(max_new_tokens=new, precision=precision)
    practice(model, Given(texts), context, len(prompts), settings)


class Given:
    """A tokenizer whose texts are names of rows of token ids."""

    def __init__(self, rows: dict[str, list[int]]):
        self.eos_id, self.rows = None, rows

    def encode_all(self, texts: list[str]) -> Rows:
        return [self.rows[text] for text in texts]


def trained(pair: tuple, precision: str, arguments: Any) -> list[dict[str, Any]]:
    results = []
    for title, (size, prompt, shared, answer) in TRAINED.items():
        data = training_batch(size, prompt, shared, answer, arguments.device)
        what = f"{title} trained/s, batch {size}, {prompt} ({shared} shared) + {answer} tokens, {precision}"
        results.append(turns(what, size, arguments, minicd=our_updates(pair[0], data, 1, precision),
                             transformers=their_updates(pair[1], data, precision)))
    return results


def practised(pair: tuple, precision: str, arguments: Any) -> list[dict[str, Any]]:
    results = []
    for title, (size, length, shared, new) in PRACTISED.items():
        prompts = random_rows(size, length, shared)
        cache = ({"dynamic": None}.get(arguments.cache, arguments.cache) if arguments.cache else
                 faster_cache(pair[1], prompts, new, precision))
        what = f"{title} practised/s, {size} × {length} ({shared} shared) → {new}, {precision}"
        results.append(turns(what, size, arguments, minicd=partial(
            our_practice, pair[0], prompts, new, precision), transformers=partial(
            their_practice, pair[1], prompts, new, precision, cache)) | {"their_cache": cache or "dynamic"})
    return results


def parse() -> Any:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=["fp32", "bf16"], action="append", help="only this one")
    parser.add_argument("--only", choices=["trained", "practised"], help="only these rows")
    parser.add_argument("--cache", choices=["dynamic", "static"], help="transformers', without trying both")
    parser.add_argument("--rounds", type=count, default=5, help="timed turns of each side")
    return parsed(parser, "bench-real")


def main() -> None:
    arguments, hf = parse(), import_transformers()
    keep_memory()
    ours, _ = load(MODEL, arguments.device)
    ours.config.more_eos_token_ids, ours.config.eos_token_id = (), ours.config.vocab_size  # no row stops
    theirs = hf.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(arguments.device)
    check_same(ours, theirs)
    results = []
    for precision in arguments.precision or ["fp32", "bf16"]:
        if arguments.only != "practised":
            results += trained((ours, theirs), precision, arguments)
        if arguments.only != "trained":
            results += practised((ours, theirs), precision, arguments)
    settings = {key: getattr(arguments, key) for key in ("rounds", "cpu_time")}
    publish(arguments.out, arguments.device, settings, results, transformers=hf.__version__)


if __name__ == "__main__":
    guarded(main)
