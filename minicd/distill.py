"""Context distillation: Ω = (D, T_teacher, T_student, f), the practice pass, and the distillation pass (paper, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import nn

from .labels import Examples, Ragged, SoftLabels
from .sampling import generate, score
from .tokenizer import TextTokenizer
from .training import Epochs, FitSettings, fit

Template = Callable[[str], str]
Extractor = Callable[[list[int]], slice | None]


@dataclass
class Context:
    """The four components of one context-distillation operation (paper, section 2.1)."""

    inputs: Callable[[int, np.random.Generator], list[str]]  # D: draws n raw task inputs
    teacher: Template  # T_t: the rich prompt
    student: Template  # T_s: the minimal prompt
    extract: Extractor  # f: which tokens of a completion are the answer; None: there is no answer in it


@dataclass
class PracticeSettings:
    """How the teacher practises. The paper: temperature 1, 100 samples a soft label (section 2.4)."""

    label_samples: int = 100
    temperature: float = 1.0
    max_new_tokens: int = 128
    chunk: int = 4096  # inputs between writes to disk


class NoAnswers(ValueError):
    """The extractor found (almost) no answers in the teacher's completions: there is nothing to distil."""


def practice(teacher: nn.Module, tokenizer: TextTokenizer, context: Context, n: int,
             settings: PracticeSettings = PracticeSettings(), *, seed: int = 0, folder: Path | None = None,
             name: str = "practice") -> Examples:
    """Sample inputs x ~ D, completions y ~ p_θ0(· | T_t(x)), keep f(y) and draw the teacher's soft label of each of its tokens.

    With `folder`, every finished chunk is kept there and a rerun goes on after the last one. Items without an extractable answer
    are dropped: the result may have fewer than n examples. Raises NoAnswers where less than a tenth of a chunk has an answer.
    """
    parts = []
    for i, start in enumerate(range(0, n, settings.chunk)):
        path = folder / f"chunk-{i:04d}.safetensors" if folder else None
        if path and path.exists():
            parts.append(Examples.load(path))
            continue
        size = min(settings.chunk, n - start)
        part = practice_chunk(teacher, tokenizer, context, size, settings, seed=(seed, i), name=f"{name} {start + size}/{n}")
        if len(part) < size / 10:
            raise NoAnswers(f"only {len(part)} of {size} completions of the teacher have an extractable answer; train the "
                            "teacher longer, or check that its prompt and the extractor fit together")
        if path:
            part.save(path)
        parts.append(part)
    return Examples.join(parts)


def practice_chunk(teacher: nn.Module, tokenizer: TextTokenizer, context: Context, n: int, settings: PracticeSettings,
                   seed: tuple[int, int], name: str) -> Examples:
    """One chunk of `practice`: two passes, `generate` draws y and `score` gives the teacher's logits at the tokens f kept."""
    device = next(teacher.parameters()).device
    generator = torch.Generator(device).manual_seed(seed[0] * 1_000_003 + seed[1])
    inputs = context.inputs(n, np.random.default_rng(seed))
    prompts = tokenizer.encode_all([context.teacher(x) for x in inputs])
    completions = generate(teacher, prompts, settings.max_new_tokens, settings.temperature, generator=generator, progress=name)
    found = [context.extract(y) for y in completions]
    slices = [s and slice(*s.indices(len(y))) for y, s in zip(completions, found)]  # open and negative ends made plain
    kept = [i for i, s in enumerate(slices) if s is not None]
    logits = score(teacher, [prompts[i] for i in kept], [completions[i][: slices[i].stop] for i in kept],
                   keep=[slices[i] for i in kept])
    answers = [completions[i][slices[i]] for i in kept]
    students = tokenizer.encode_all([context.student(inputs[i]) for i in kept])
    return label(students, answers, logits, tokenizer.eos_id, settings.label_samples, generator)


def label(prompts: list[list[int]], answers: list[list[int]], logits: list[torch.Tensor], eos: int, samples: int,
          generator: torch.Generator) -> Examples:
    """Soft labels for every token of every answer, and a hard one for the stop token that f cut off.

    Without it the student would not learn to stop.
    """
    if not answers:
        return Examples.hard([], [])
    soft = SoftLabels.sample(torch.cat(logits), samples, generator)
    lengths = torch.tensor([len(a) for a in answers])
    stops = lengths.cumsum(0) + torch.arange(len(answers))  # where each answer's stop token stands
    is_stop = torch.zeros(int(lengths.sum()) + len(answers), dtype=torch.bool)
    is_stop[stops] = True
    # one label a stop token after all soft ones, then every label put in its place
    joined = SoftLabels.join([soft, SoftLabels.one_hot(torch.full((len(answers),), eos))])
    source = torch.where(is_stop, len(soft.ids) + is_stop.cumsum(0) - 1, (~is_stop).cumsum(0) - 1)
    return Examples(Ragged.of(prompts), Ragged.of([[*a, eos] for a in answers]), joined.take(source))


def distill(student: nn.Module, items: Examples, settings: FitSettings = FitSettings(loss="empirical"), *,
            epochs: float = 1.0, seed: int = 0, checkpoint: Path | None = None, save_every: float = 30.0,
            name: str = "distill") -> list[float]:
    """Fit p_θ(f(y) | T_s(x)) to the labels, in place (equation 1; the loss is `settings.loss`). Returns the loss curve."""
    batches = Epochs(items, settings.batch_size, epochs, seed, student.config.pad_token_id)
    return fit(student, batches, settings, seed=seed, checkpoint=checkpoint, save_every=save_every, name=name)
