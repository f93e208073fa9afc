"""generate(): batched sampling with a key/value cache. score(): teacher-forced logits of given answers."""

from __future__ import annotations

import math
import warnings
from contextlib import contextmanager
from typing import Callable, Sequence

import torch
from torch import Tensor

from .runtime.device import autocast
from .runtime.fast import pack_weights, stepper
from .runtime.memory import out_of_memory, room
from .runtime.progress import bar

LOGITS_AT_ONCE = 2**28  # the most numbers that score() makes at a time: 1 GiB in fp32
LOOK_EVERY = 8  # steps between checks for finished rows on CUDA, where each check waits for the device
SHRINK_BELOW = 0.75  # the share of running rows below which smaller steps pay for the copy of the cache
SHRINK_RECORDED_BELOW = 0.5  # the same on CUDA, where the smaller step has to be recorded anew
NO_NUMBERS = "the model's logits are not numbers: was its training stable?"
Pick = Callable[[Tensor], "tuple[Tensor, ...]"]  # logits [B, V] → next tokens [B], what else to keep [B, …]


@torch.no_grad()
def generate(model, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, stop: Sequence[int | str] = (),
             generator: torch.Generator | None = None, batch_size: int = 512, progress: str = "",
             tokenizer=None, reasons: bool = False, precision: str | None = None, pick: Pick | None = None,
             keep_end: bool = False) -> list[list[int]] | tuple[list, ...]:
    """Sample one completion for each prompt (lists of token ids); temperature 0 is greedy.

    `stop`: token ids, and strings (which need the `tokenizer`), that end a completion like the model's own
    end-of-sequence tokens. Returns token-id lists without what ended them, or, with `keep_end`, with the
    end-of-sequence token that did; with `reasons`, also why each ended: "eos", "stop", or "length" after
    max_new_tokens tokens. `precision`: bf16, fp32, auto, or None for
    that of the weights. Batches have at most `batch_size` rows, fewer where the CPU's cache of keys and
    values would be large; where memory runs out, they are halved, with a warning.
    `pick` chooses instead of temperature, top_k and top_p, and may make more of each step's logits: with it,
    reasons are returned, and for each completion y a tuple of what was made [max_new_tokens, …]: row t at
    y[t], row len(y) at the token that ended y, and nothing of meaning after it.
    Raises ValueError for an empty or too long prompt, a setting out of range, another device's generator.
    """
    check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    stops, returned = Stops(model, stop, tokenizer), 3 if pick else 1 + reasons
    pick = pick or (lambda logits: (choose(logits, temperature, top_k, top_p, generator),))
    results, why, made = ([empty] * len(prompts) for empty in ([], "length", ()))
    device = next(model.parameters()).device
    if generator and generator.device.type != device.type:
        raise ValueError(f"the generator is on {generator.device} and the model on {device}: "
                         f"make it with torch.Generator({device.type!r})")
    with eval_mode(model), pack_weights(model), autocast(device, precision):
        def run(rows: list[int]) -> None:
            batch = pad([prompts[i] for i in rows], model.config.pad_token_id).to(device)
            tokens, *more = sample_batch(model, batch, max_new_tokens, stops, pick)
            for i, row, *rest in zip(rows, tokens.tolist(), *(x.cpu() for x in more)):
                (results[i], why[i]), made[i] = stops.cut(row), tuple(rest)
                if keep_end and why[i] == "eos":
                    results[i] = row[: len(results[i]) + 1]
        rows = room(model.config, prompts, max_new_tokens) if device.type == "cpu" else None
        in_batches(run, by_length(prompts), batch_size, generator, progress, rows)
    return results if returned == 1 else (results, why, made)[:returned]


def in_batches(run: Callable[[list[int]], None], rows: list[int], size: int, generator=None,
               progress: str = "", room: Callable[[int], int] | None = None) -> None:
    """Call run(batch) for batches of at most `size` rows; where memory runs out, halve the size and retry.

    `room`: a batch's first row, its longest → how many rows have room in memory.
    """
    with bar(len(rows), progress, "prompt", disable=not progress) as shown:
        while rows:
            batch = rows[: min(size, room(rows[0])) if room else size]
            state = generator.get_state() if generator else None
            try:
                run(batch)
            except (RuntimeError, MemoryError) as error:
                if len(batch) == 1 or not out_of_memory(error):
                    raise
                size = len(batch) // 2
            else:
                rows = rows[len(batch) :]
                shown.update(len(batch))
                continue
            warnings.warn(f"out of memory at a batch of {len(batch)}; going on with batches of {size}")
            if generator:
                generator.set_state(state)
            torch.cuda.empty_cache()  # outside the handler, which keeps the failed batch alive


def sample_batch(model, prompts: Tensor, max_new_tokens: int, stops: Stops, pick: Pick) -> list[Tensor]:
    """Prompts [B, S] → tokens [B, max_new_tokens], and what else `pick` makes [B, max_new_tokens, …].

    What follows a row's stop token is more stop tokens.
    """
    logits, cache = model.prefill(prompts, max_new_tokens)
    tokens, *more = pick(logits)
    out, *kept = (x.new_zeros(len(x), max_new_tokens, *x.shape[1:]) for x in (tokens, *more))
    out.fill_(stops.filler)
    put((out, *kept), slice(None), 0, (tokens, *more))
    alive = torch.arange(len(prompts), device=prompts.device)  # numbers in `out` of the rows still running
    finished = torch.isin(tokens, stops.ids)
    look_every, shrink_below = pace(prompts.device)
    step = None
    for t in range(1, max_new_tokens):
        if t % look_every == 0:
            finished = stops.find(out[alive, :t], finished)
            running = (~finished).nonzero()[:, 0]
            if len(running) == 0:
                break
            if len(running) < shrink_below * len(alive):
                cache.keep(running)
                alive, tokens, finished, step = alive[running], tokens[running], finished[running], None
        if step is None:
            step = stepper(model, tokens, cache, max_new_tokens - t)
        tokens, *more = pick(step(tokens))
        tokens = torch.where(finished, stops.filler, tokens)
        finished = finished | torch.isin(tokens, stops.ids)
        put((out, *kept), alive, t, (tokens, *more))
    return [out, *kept]


def put(memory: Sequence[Tensor], rows: Tensor | slice, t: int, step: Sequence[Tensor]) -> None:
    """Write what step t made for these rows."""
    for kept, made in zip(memory, step):
        kept[rows, t] = made


def pace(device: torch.device) -> tuple[int, float]:
    """Steps between checks for finished rows, and the share of running ones below which the others leave."""
    return (1, SHRINK_BELOW) if device.type == "cpu" else (LOOK_EVERY, SHRINK_RECORDED_BELOW)


class Stops:
    """What ends a completion: the model's end-of-sequence tokens, further token ids, and strings."""

    def __init__(self, model, stop: Sequence[int | str], tokenizer):
        self.strings = [s for s in stop if isinstance(s, str)]
        self.tokenizer = tokenizer
        if self.strings and (tokenizer is None or "" in self.strings):
            raise ValueError("stop strings need the tokenizer, and must not be empty")
        self.eos = {model.config.eos_token_id, *getattr(model.config, "more_eos_token_ids", ())} - {-1}
        self.filler = max(0, model.config.eos_token_id)  # any token: what follows an end is cut off
        named = [tokenizer.backend.token_to_id(s) for s in self.strings]
        special = [i for i in named if i is not None and not tokenizer.decode([i])]  # unseen in a text
        ids = [*self.eos, *special, *(s for s in stop if not isinstance(s, str))]
        self.ids = torch.tensor(ids, dtype=torch.long, device=next(model.parameters()).device)
        self.known = set(ids)

    def find(self, tokens: Tensor, finished: Tensor) -> Tensor:
        """`finished` [B], and the rows of `tokens` [B, T] whose text holds a stop string."""
        if not self.strings:
            return finished
        texts = [self.tokenizer.decode(row) for row in tokens.tolist()]
        hits = [any(s in text for s in self.strings) for text in texts]
        return finished | torch.tensor(hits, device=finished.device)

    def cut(self, tokens: list[int]) -> tuple[list[int], str]:
        """A row as sampled → the tokens before what ended it, and why it ended."""
        end = next((t for t, token in enumerate(tokens) if token in self.known), None)
        reason = "length" if end is None else "eos" if tokens[end] in self.eos else "stop"
        tokens = tokens[:end]
        text = self.tokenizer.decode(tokens) if self.strings else ""
        starts = [text.index(s) for s in self.strings if s in text]
        if starts:  # the most tokens whose text ends before the string begins
            lengths = range(len(tokens), -1, -1)
            n = next(n for n in lengths if len(self.tokenizer.decode(tokens[:n])) <= min(starts))
            return tokens[:n], "stop"
        return tokens, reason


def choose(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None,
           generator=None) -> Tensor:
    """Logits [B, V] → one token for each row [B]."""
    if temperature == 0:
        most, tokens = logits.max(-1)  # on the CPU, argmax takes four times as long
        if most.device.type == "cpu" and most.isnan().any():
            raise ValueError(NO_NUMBERS)
        return tokens
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        ordered, index = logits.sort(-1, descending=True)
        probability = ordered.softmax(-1)
        outside = probability.cumsum(-1) - probability >= top_p  # the most likely token always stays
        logits = logits.masked_fill(outside.gather(-1, index.argsort(-1)), -torch.inf)
    return draw(logits, 1, generator)[:, 0]


def draw(logits: Tensor, samples: int, generator: torch.Generator | None = None) -> Tensor:
    """`samples` tokens [B, samples] of softmax(logits [B, V]), drawn independently.

    Raises ValueError, on CUDA a device-side error, where logits are not numbers.
    """
    probabilities = logits.softmax(-1, dtype=torch.float32)
    if probabilities.device.type != "cpu":
        return torch.multinomial(probabilities, samples, replacement=True, generator=generator)
    # On the CPU, multinomial draws a number for each word, or adds up on one core and in fp32 alone
    sums = probabilities.cumsum(-1)
    if sums[:, -1].isnan().any():
        raise ValueError(NO_NUMBERS)
    points = torch.rand(len(sums), samples, generator=generator) * sums[:, -1:]
    return torch.searchsorted(sums, points, right=True)  # right: never a word of probability 0


@torch.no_grad()
def score(model, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], batch_size: int = 512,
          keep: Sequence[slice] | None = None, precision: str | None = None) -> list[Tensor]:
    """Teacher-forced logits, fp32 [T, V] an answer: row t predicts answer[t] from the prompt and answer[:t].

    `keep` has a slice for each answer: only those rows are returned. `precision` as in `generate`.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts, but {len(answers)} answers")
    device, pad_id = next(model.parameters()).device, model.config.pad_token_id
    results: list[Tensor] = [torch.empty(0)] * len(prompts)
    longest = max([1, *map(len, answers)])
    batch_size = max(1, min(batch_size, LOGITS_AT_ONCE // (longest * model.config.vocab_size)))
    with eval_mode(model), pack_weights(model), autocast(device, precision):
        def run(rows: list[int]) -> None:
            batch = [pad([texts[i] for i in rows], pad_id).to(device) for texts in (prompts, answers)]
            for i, row in zip(rows, model(*batch)):
                row = row[: len(answers[i])]
                results[i] = (row[keep[i]] if keep else row).float().clone()  # a view would keep all rows
        in_batches(run, by_length([[*p, *a] for p, a in zip(prompts, answers)]), batch_size)
    return results


@contextmanager
def eval_mode(model):
    """Turn dropout off inside, and restore it afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def by_length(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Row numbers, longest first: batches have similar lengths, and what exceeds the memory fails early."""
    return sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Token-id lists → [B, longest], padded on the right."""
    longest = max(1, max(len(row) for row in rows))
    return torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])


def check(model, prompts, max_new_tokens: int, temperature: float, top_k: int | None,
          top_p: float | None) -> None:
    empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty:
        raise ValueError(f"prompt {empty[0]} is empty")
    top = max((max(prompt) for prompt in prompts), default=0)
    if top >= model.config.vocab_size or min((min(prompt) for prompt in prompts), default=0) < 0:
        raise ValueError(f"a prompt has a token id outside 0…{model.config.vocab_size - 1}: the tokenizer is "
                         "another model's")
    limit = getattr(model.config, "max_positions", math.inf)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]), default=0)
    if prompts and len(prompts[longest]) + max_new_tokens > limit:
        raise ValueError(f"prompt {longest} has {len(prompts[longest])} tokens; with {max_new_tokens} new "
                         f"ones these are more than the model's {limit} positions")
    if max_new_tokens < 1 or not temperature >= 0 or (top_k is not None and top_k < 1):
        raise ValueError("max_new_tokens and top_k must be at least 1, temperature at least 0")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], not {top_p}")
