"""generate(): batched sampling with a key/value cache. score(): teacher-forced logits of given answers."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from .device import autocast

LOGITS_AT_ONCE = 2**28  # most numbers that score() makes at a time: 1 GiB in fp32
LOOK_EVERY = 8  # steps between looks at which rows have finished: each look waits for the device


@torch.no_grad()
def generate(model, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, stop: Sequence[int] = (),
             generator: torch.Generator | None = None, batch_size: int = 512, progress: str = "") -> list[list[int]]:
    """Sample one completion for each prompt (lists of token ids); temperature 0 is greedy.

    Returns token-id lists without the stop token; a completion that never stopped has max_new_tokens tokens.
    `stop` are token ids that end a completion besides the model's own end-of-sequence token.
    Raises ValueError for an empty prompt or a setting out of range.
    """
    check(prompts, max_new_tokens, temperature, top_k, top_p)
    device = next(model.parameters()).device
    stops = torch.tensor([model.config.eos_token_id, *stop], device=device)
    results: list[list[int]] = [[]] * len(prompts)
    for rows in buckets(prompts, batch_size, progress):
        batch = pad([prompts[i] for i in rows], model.config.pad_token_id).to(device)
        with evaluating(model), autocast(device):
            tokens = sample_batch(model, batch, max_new_tokens, stops, (temperature, top_k, top_p, generator))
        ended = torch.isin(tokens, stops)
        lengths = torch.where(ended.any(1), ended.int().argmax(1), tokens.shape[1])
        for i, row, length in zip(rows, tokens.tolist(), lengths.tolist()):
            results[i] = row[:length]
    return results


def sample_batch(model, prompts: Tensor, max_new_tokens: int, stops: Tensor, how: tuple) -> Tensor:
    """Prompts [B, S] → tokens [B, max_new_tokens]; what follows a row's stop token is more stop tokens."""
    cache = model.prefill(prompts, max_new_tokens)
    out = torch.full((len(prompts), max_new_tokens), int(stops[0]), device=prompts.device)
    alive = torch.arange(len(prompts), device=prompts.device)  # row numbers in `out` of the rows still running
    finished = torch.zeros_like(alive, dtype=torch.bool)
    tokens = None
    for t in range(max_new_tokens):
        tokens = choose(model.step(tokens, cache), *how)
        tokens = torch.where(finished, stops[0], tokens)
        finished = finished | torch.isin(tokens, stops)
        out[alive, t] = tokens
        if t % LOOK_EVERY == LOOK_EVERY - 1:
            running = (~finished).nonzero()[:, 0]
            if len(running) == 0:
                break
            if len(running) < 0.75 * len(alive):  # smaller steps pay for the copy
                cache.keep(running)
                alive, tokens, finished = alive[running], tokens[running], finished[running]
    return out


def choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator) -> Tensor:
    """Logits [B, V] → one token for each row [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        ordered, index = logits.sort(-1, descending=True)
        probability = ordered.softmax(-1)
        outside = probability.cumsum(-1) - probability >= top_p  # the most likely token always stays
        logits = logits.masked_fill(outside.gather(-1, index.argsort(-1)), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def score(model, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], batch_size: int = 512,
          keep: Sequence[slice] | None = None) -> list[Tensor]:
    """Teacher-forced logits: for each answer [T, V] in fp32, row t predicting answer[t] from the prompt and answer[:t].

    `keep` has a slice for each answer: only those rows of its logits are returned.
    """
    device, pad_id = next(model.parameters()).device, model.config.pad_token_id
    results: list[Tensor] = [torch.empty(0)] * len(prompts)
    longest = max([1, *map(len, answers)])
    batch_size = max(1, min(batch_size, LOGITS_AT_ONCE // (longest * model.config.vocab_size)))
    for rows in buckets([[*p, *a] for p, a in zip(prompts, answers, strict=True)], batch_size):
        inputs = pad([prompts[i] for i in rows], pad_id).to(device), pad([answers[i] for i in rows], pad_id).to(device)
        with evaluating(model), autocast(device):
            logits = model(*inputs)
        for i, row in zip(rows, logits):
            row = row[: len(answers[i])]
            results[i] = (row[keep[i]] if keep else row).float().clone()  # a view would keep the whole batch in memory
    return results


@contextmanager
def evaluating(model):
    """Dropout off inside, and as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def buckets(sequences: Sequence[Sequence[int]], batch_size: int, progress: str = "") -> Iterator[list[int]]:
    """Row numbers in batches of similar length, longest first so that what does not fit into memory fails early."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    with tqdm(total=len(order), desc=progress, unit="prompt", disable=not progress, mininterval=1.0) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield rows
            bar.update(len(rows))


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Token-id lists → [B, longest], padded on the right."""
    longest = max(1, max(len(row) for row in rows))
    return torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])


def check(prompts, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty:
        raise ValueError(f"prompt {empty[0]} is empty")
    if max_new_tokens < 1 or not temperature >= 0 or (top_k is not None and top_k < 1):
        raise ValueError("max_new_tokens and top_k must be at least 1, temperature at least 0")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], not {top_p}")
