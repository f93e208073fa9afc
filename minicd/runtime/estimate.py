"""What a run will need, before it starts: bytes from the model's sizes and its widest batch.

A training step is followed from tensor to tensor: forward keeps what backward will read; on top of all of it
come the logits and what the loss makes of them; then gradients take its place. Masks, token ids and what a
single operation holds for a moment are left out. Lengths are upper bounds: most runs stay below.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterable

import torch
from torch import nn

from .device import in_bf16
from .lean import LOGITS_AT_ONCE, PART, READ_AT_ONCE, rows_together
from .memory import cached_numbers, rows_cached

COPIES = {"empirical": 1, "hard": 1, "topk": 4, "exact": 6, "reverse": 6, "jsd": 10}  # of the logits, by loss
TOP_COPIES = 4  # at most, where labels do not name the whole vocabulary
AT_ONCE, LEAVING = 512, 0.75  # rows of sampling.py and distill.py; copied rows as others leave the cache


@dataclass
class Batch:
    """The widest one: its rows, and the tokens of the student's prompt, the answer, the teacher's prompt."""

    rows: int
    prompt: int
    answer: int
    teacher_prompt: int = 0


def is_t5(c: Any) -> bool:
    return hasattr(c, "num_decoder_layers")


def is_gated(c: Any) -> bool:
    return c.feed_forward_proj.startswith("gated-") if is_t5(c) else c.gated


def block_bytes(c: Any, tokens: int, keys: int, wide: int, weights: bool = False, noise: bool = False,
                memory: int | None = None) -> float:
    """What a block of a model with config `c` keeps for backward of its tokens, each attending to `keys`.

    `wide`: bytes of a number out of a matrix product; norms and residual sums have 4. `weights`: whether
    attention keeps its own. `noise`: of dropout. `memory`: the tokens that a T5 decoder's cross-attention
    reads.
    """
    kv_heads, relu = getattr(c, "num_kv_heads", c.num_heads), "relu" in vars(c).values()
    inner, kv = c.num_heads * c.d_kv, kv_heads * c.d_kv
    rms = getattr(c, "norm", "rms") == "rms"
    norm = c.d_model * (8 if rms else 4) + c.d_model * wide  # x, x / rms(x); what comes out
    attention = 2 * inner + 2 * kv + weights * c.num_heads * keys  # q, k, v, y
    if getattr(c, "positions", "") == "rotary":
        attention += 2 * inner + kv  # q and k turned, and y in another layout
    feed_forward = c.d_ff * (4 if is_gated(c) else 2 - relu)
    dropped = noise * (2 * c.d_model + is_t5(c) * c.d_ff)
    a_token = 2 * norm + wide * (attention + feed_forward + dropped)
    if memory is None:
        return tokens * a_token
    return tokens * (a_token + norm + wide * (2 * inner + noise * c.d_model)) + memory * wide * 2 * inner


def gradient_bytes(c: Any, tokens: int, keys: int, wide: int, weights: bool = False) -> float:
    """The gradients that are there together while backward is inside a block's feed-forward or attention."""
    return tokens * wide * (2 * c.d_model + max(c.d_ff * (1 + is_gated(c)), weights * 2 * c.num_heads * keys))


def kept_bytes(c: Any, batch: Batch, wide: int, plain: bool, how: Any) -> float:
    """What all blocks keep for backward, and the gradients inside one of them.

    `plain`: the device's attention keeps its weights. T5's does where its relative bias learns.
    """
    noise = (c.dropout_rate if how.dropout is None else how.dropout) > 0
    prompt, answer = batch.rows * batch.prompt, batch.rows * batch.answer
    if is_t5(c):
        plain = plain or not how.lora_rank
        blocks = [block_bytes(c, prompt, batch.prompt, wide, plain, noise)] * c.num_layers
        blocks += [block_bytes(c, answer, batch.answer, wide, plain, noise, prompt)] * c.num_decoder_layers
        inputs = 4 * c.d_model * (prompt * c.num_layers + answer * c.num_decoder_layers)
        inputs += wide * 2 * c.num_heads * c.d_kv * prompt * c.num_decoder_layers  # keys and values
        inside = max(gradient_bytes(c, prompt, batch.prompt, wide, plain),
                     gradient_bytes(c, answer, batch.answer, wide, plain))
    else:
        length = batch.prompt + batch.answer - 1
        blocks = [block_bytes(c, batch.rows * length, length, wide, plain, noise)] * c.num_layers
        inputs = 4 * c.d_model * batch.rows * length * c.num_layers
        inside = gradient_bytes(c, batch.rows * length, length, wide, plain)
    return inside + (inputs + max(blocks) if how.checkpointing else sum(blocks))


def training(model: nn.Module, batch: Batch, how: Any, device: torch.device,
             label: int = 100) -> dict[str, float]:
    """Bytes of training a copy of the model, beside its teacher: by their use, and at the peak.

    `how`: FitSettings. `label`: the tokens that a soft label names. The model may be on the meta device.
    """
    c, bf16 = model.config, in_bf16(device, how.precision)
    half = how.precision == "bf16-weights"  # then what the teacher and the student compute with
    together = how.micro_batch or rows_together(c, batch.rows, batch.prompt + batch.answer, device)
    part = replace(batch, rows=min(batch.rows, together))
    wide, tokens, label = 4 - 2 * bf16, part.rows * part.answer, min(label, c.vocab_size)
    everything, learnt, states, step, merged = parameters(model, how)
    by_parts = tokens * c.vocab_size > LOGITS_AT_ONCE
    head = 0 if how.lora_rank else 4 * c.vocab_size * c.d_model  # a gradient by itself
    need = {"weights": (4 - 2 * half) * everything + 4 * learnt + 2 * (learnt if half else bf16 * everything),
            "optimiser": states, "gradients": 4 * learnt,
            "activations": kept_bytes(c, part, wide, bf16 and device.type == "cpu", how),
            "logits": loss_bytes(c, tokens, how.loss, label, wide, by_parts),
            "labels": batch.rows * batch.answer * label * 12}
    early = need["activations"] + need["logits"] + head + need["gradients"] * (part.rows < batch.rows)
    late = max(need["gradients"] + max(head, step), merged)
    return need | {"peak": need["weights"] + states + need["labels"] + max(early, late)}


def loss_bytes(c: Any, tokens: int, loss: str, label: int, wide: int, by_parts: bool) -> float:
    """The logits, and their copies in the loss; by parts, also the states that the head reads."""
    copies = COPIES.get(loss, TOP_COPIES)
    copies = copies if label == c.vocab_size else min(copies, TOP_COPIES)
    return ((PART if by_parts else tokens * c.vocab_size) * (wide + 4 * copies)
            + by_parts * tokens * c.d_model * 8)


def parameters(model: nn.Module, how: Any) -> tuple[int, int, int, int, int]:
    """How many there are and learn; bytes of the optimiser's states, of its step, and of the merging."""
    everything = sum(p.numel() for p in model.parameters())
    matrices = [p for name, p in model.named_parameters() if "blocks." in name and p.ndim == 2]
    inside = sum(p.numel() for p in matrices)
    if how.lora_rank:
        low_rank = how.lora_rank * sum(sum(p.shape) for p in matrices)
        return everything, low_rank, (4 if how.optimiser == "muon" else 8) * low_rank, 0, 4 * inside
    if how.optimiser != "muon":
        return everything, everything, 8 * everything, 0, 0
    alike = Counter()  # matrices of a shape take their step together
    for p in matrices:
        alike[p.shape] += p.numel()
    return everything, everything, 8 * everything - 4 * inside, 12 * max(alike.values()), 0


def practising(model: nn.Module, batch: Batch, settings: Any, items: int, device: torch.device) -> float:
    """Bytes at the peak of practice, besides teacher and student. `settings`: PracticeSettings."""
    c, bf16 = model.config, in_bf16(device, settings.precision)
    wide, chunk = 4 - 2 * bf16, min(settings.chunk, items)
    most, prompt, answer = min(AT_ONCE, chunk), batch.teacher_prompt, batch.answer
    rows = min(most, rows_cached(c, prompt + answer)) if device.type == "cpu" else most
    packed = wide * sum(p.numel() for p in model.parameters()) * (device.type == "cpu")
    number = 4 if device.type == "cpu" else wide  # of a cached one
    cache = number * rows * (prompt + answer) * cached_numbers(c)
    parts = device.type == "cpu" and not is_t5(c)  # of rows that are read together
    read = min(rows, max(1, READ_AT_ONCE // prompt)) if parts else rows
    reading = block_bytes(c, read * prompt, prompt, wide) + 5 * read * prompt**2
    reading += 4 * rows * prompt * c.d_model * 2 * (read < rows)  # what was read, joined
    writing = cache * LEAVING + 12 * most * c.vocab_size  # logits, probabilities and their sums
    sampled, top = 4 * (1 + settings.label_samples), 12 * settings.label_top
    kept = chunk * answer * {"sampled": sampled, "top": top, "exact": 8 * c.vocab_size}[settings.labels]
    second = 20 * rows * answer * c.vocab_size * (settings.labels == "exact")
    return packed + cache + max(reading, writing, second) + kept


@dataclass
class Plan:
    """A run that distils: what the model's student reads, how it learns, and how its teacher practises."""

    model: nn.Module
    batch: Batch
    fit: Any  # FitSettings
    practice: Any  # PracticeSettings
    items: int  # of the largest practice set
    device: torch.device

    @property
    def label(self) -> int:
        """The tokens that a soft label names."""
        sizes = {"sampled": self.practice.label_samples, "top": self.practice.label_top}
        return sizes.get(self.practice.labels, self.model.config.vocab_size)

    def training(self) -> dict[str, float]:
        return training(self.model, self.batch, self.fit, self.device, self.label)

    def practising(self) -> float:
        """With teacher and student."""
        shared = practising(self.model, self.batch, self.practice, self.items, self.device)
        return self.training()["weights"] + shared

    def peak(self) -> float:
        return max(self.training()["peak"], self.practising())

    def on_disk(self) -> float:
        """Bytes of the practice set, at most: a label of N samples names at most N tokens."""
        return self.items * (4 * (self.batch.prompt + self.batch.answer) + 8 * self.batch.answer * self.label)


def what_it_needs(plan: Plan, folder: Path, flags: Iterable[str], jobs: int = 1) -> str:
    """A line on what a run needs beside what there is; where that is too little, the flag that helps most.

    `flags`: those that the run knows. `jobs`: how many stages may need so much at the same time.
    """
    need, room, space = plan.training(), free_memory(plan.device), free_disk(folder)
    uses = ", ".join(f"{use} {size(value)}" for use, value in need.items() if use != "peak")
    times = f", each of {jobs} stages at a time" if jobs > 1 else ""
    lines = [f"memory: up to {size(need['peak'])} in training ({uses}), {size(plan.practising())} in practice"
             f"{times}; {size(room)} are free. Disk: up to {size(plan.on_disk())} for a practice set; "
             f"{size(space)} are free"]
    if jobs * plan.peak() > room:
        lines.append(f"this may be too much memory; most would help: {advice(plan, flags, jobs)}")
    if plan.on_disk() > space:
        lines.append("this may be too much for the disk; --labels top with a small --label-top needs less")
    return "\n".join(lines)


def advice(plan: Plan, flags: Iterable[str], jobs: int) -> str:
    """Of the flags that save memory the one that lowers the peak most, and the peak with it."""
    fit, practice = plan.fit, plan.practice
    plans = {"--micro-batch 1": replace(plan, fit=replace(fit, micro_batch=1)),
             "--checkpointing": replace(plan, fit=replace(fit, checkpointing=True)),
             "--lora-rank 8": replace(plan, fit=replace(fit, lora_rank=fit.lora_rank or 8)),
             "--batch-size 1": replace(plan, batch=replace(plan.batch, rows=1)),
             "--chunk 64": replace(plan, practice=replace(practice, chunk=min(64, practice.chunk)))}
    found = {flag: jobs * other.peak() for flag, other in plans.items() if flag.split()[0] in flags}
    found |= {"--jobs 1": plan.peak()} if jobs > 1 else {}
    best = min(found, key=found.get)
    return f"{best}, with which it is {size(found[best])}"


def free_memory(device: torch.device) -> float:
    """Bytes of the GPU, or of the machine (within its container), that no program uses."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = Path("/proc/meminfo")
    lines = known.read_text().splitlines() if known.exists() else []
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    free = free or [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]  # all there is
    return min([*free, *free_in_container(Path("/sys/fs/cgroup"))])


def free_in_container(folder: Path) -> list[int]:
    """Bytes left below the limit of this control group, if it has one. Files read lately give way."""
    most, used, more = (path.read_text() if (path := folder / f"memory.{name}").exists() else ""
                        for name in ("max", "current", "stat"))
    if not most.strip().isdigit():
        return []
    files = [int(line.split()[1]) for line in more.splitlines() if line.startswith("inactive_file ")]
    return [int(most) - int(used or 0) + sum(files)]


def free_disk(folder: Path) -> float:
    """Bytes on the disk of a folder, which need not be there yet."""
    path = folder.absolute()
    return shutil.disk_usage(next(p for p in [path, *path.parents] if p.exists())).free


def size(number: float) -> str:
    """1.5 · 2^30 → 1.5 GiB"""
    unit, name = next(((2**k, name) for k, name in ((30, "GiB"), (20, "MiB")) if number >= 2**k),
                      (2**10, "KiB"))
    return f"{number / unit:.{int(number < 10 * unit)}f} {name}"
