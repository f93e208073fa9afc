"""Context distillation (paper, section 2): Ω = (D, T_teacher, T_student, f), practice, and distillation."""

from __future__ import annotations

import functools
import json
import math
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .labels import Examples, Ragged, SoftLabels, likeliest
from .losses import check_labels
from .runtime.checks import at_least_one, source_digest
from .runtime.files import open_safetensors
from .sampling import LOGITS_AT_ONCE, Pick, draw, generate, score
from .tokenizer import TextTokenizer
from .training import Epochs, FitSettings, fit

LABELLED_AT_ONCE = 512  # the most answers that are labelled together
KEPT_MOST = 128  # draws or likeliest tokens of each step that are kept until f has read the completion
Template = Callable[[str], str]
Extractor = Callable[[list[int]], slice | None]


@dataclass
class Context:
    """The four components of one context-distillation operation (paper, section 2.1)."""

    inputs: Callable[[int, np.random.Generator], list[str]]  # D: draws n raw task inputs
    teacher: Template | Sequence[Template]  # T_t: the rich prompt; of several, one draws y, all label it
    student: Template  # T_s: the minimal prompt
    extract: Extractor  # f: which tokens of a completion are the answer; None: there is no answer in it

    @property
    def teachers(self) -> list[Template]:
        return [self.teacher] if callable(self.teacher) else list(self.teacher)


def identity(completion: list[int]) -> slice:
    """The extractor f(y) = y."""
    return slice(None)


everything = identity  # its name in contexts files
LABEL_KINDS = ("sampled", "top", "exact")  # of labels; another is a branch of `soft_labels`


@dataclass
class PracticeSettings:
    """How the teacher practises. The paper: y ~ p_θ0 (section 2.2), 100 samples a soft label (2.4)."""

    labels: str = "sampled"  # sampled: the empirical label; top: the likeliest tokens; exact: all tokens
    label_samples: int = 100  # of a sampled label
    label_top: int = 16  # tokens of a top label
    temperature: float = 1.0  # of y; labels are always those of temperature 1
    max_new_tokens: int = 128
    chunk: int = 4096  # inputs between writes to disk
    precision: str | None = None  # None: that of the weights; else bf16, fp32, or auto

    def __post_init__(self):
        at_least_one(self, "label_samples", "label_top", "max_new_tokens", "chunk")
        if self.labels not in LABEL_KINDS:
            raise ValueError(f"labels {self.labels!r} are unknown; known: {', '.join(LABEL_KINDS)}")


class NoAnswers(ValueError):
    """The extractor found (almost) no answers in the teacher's completions: there is nothing to distil."""


def practice(teacher: nn.Module, tokenizer: TextTokenizer, context: Context, n: int,
             settings: PracticeSettings = PracticeSettings(), *, seed: int = 0, folder: Path | None = None,
             name: str = "practice") -> Examples:
    """Sample x ~ D and y ~ p_θ0(· | T_t(x)), keep f(y), and draw the teacher's soft label of each token kept.

    With `folder`, finished chunks are kept there and a rerun resumes after the last one. Items without an
    extractable answer are dropped, so the result may have fewer than n examples. Raises NoAnswers where less
    than a tenth of a whole chunk has an answer, ValueError where n < 1 or a chunk is of another practice.
    """
    if n < 1:
        raise ValueError(f"practice on {n} inputs: at least 1 is needed")
    parts = []
    for i in range(math.ceil(n / settings.chunk)):
        path = folder / f"chunk-{i:04d}.safetensors" if folder else None
        if path and path.exists():
            parts.append(saved_chunk(path, context, n, i, settings, seed))
            continue
        part = practice_chunk(teacher, tokenizer, context, n, i, settings, seed=seed, name=name)
        if path:
            part.save(path, {"practice": described(part, context, n, i, settings, seed)})
        parts.append(part)
    return Examples.join(parts)


def saved_chunk(path: Path, context: Context, n: int, chunk: int, settings: PracticeSettings,
                seed: int) -> Examples:
    """A chunk that `practice` wrote. Raises ValueError where it is damaged or of another practice."""
    part = Examples.load(path)
    with open_safetensors(path) as file:
        found = (file.metadata() or {}).get("practice")
    if found not in (None, described(part, context, n, chunk, settings, seed)):
        raise ValueError(f"{path} is of a practice with other prompts, f, D, settings or seed; choose "
                         "another folder, or delete this one to practise anew")
    return part


def described(part: Examples, context: Context, n: int, chunk: int, settings: PracticeSettings,
              seed: int) -> str:
    """A checksum of what a chunk depends on but for its teacher's weights."""
    size = min(settings.chunk, n - chunk * settings.chunk)
    return str(checksum(context, [part.input(0)] if len(part) else [], asdict(settings), seed, size))


def checksum(context: Context, inputs: list[str], *more: Any) -> int:
    """Of a context and more: what its templates make of the inputs, and how D and f are written."""
    prompts = [template(x) for template in (*context.teachers, context.student) for x in inputs]
    sources = [source_digest(function) for function in (context.inputs, context.extract)]
    return zlib.crc32(json.dumps([*more, prompts, sources]).encode())


def practice_chunk(teacher: nn.Module, tokenizer: TextTokenizer, context: Context, n: int, chunk: int,
                   settings: PracticeSettings, *, seed: int = 0, name: str = "practice") -> Examples:
    """Chunk number `chunk` of `practice`: `generate` samples y and its labels, of which those of f(y) stay.

    Where `picker` knows no way to label while sampling, the teacher reads y in a second pass.
    It depends on no other chunk, so chunks can be made in parallel.
    """
    start, device = chunk * settings.chunk, next(teacher.parameters()).device
    size = min(settings.chunk, n - start)
    rng = np.random.default_rng((seed, chunk))
    generator = torch.Generator(device).manual_seed(combine_seeds((seed, chunk)))
    inputs = context.inputs(size, rng)
    if len(inputs) != size:
        raise ValueError(f"D was asked for {size} inputs and drew {len(inputs)}")
    prompts = [tokenizer.encode_all([template(x) for x in inputs]) for template in context.teachers]
    sampled_from = rng.integers(len(prompts), size=size) if len(prompts) > 1 else [0] * size  # of an ensemble
    pick = picker(settings, len(prompts), generator)
    sampled, reasons, *made = generate(teacher, [prompts[k][i] for i, k in enumerate(sampled_from)],
                                       settings.max_new_tokens, settings.temperature, generator=generator,
                                       progress=f"{name} {start + size}/{n}", reasons=True, keep_end=True,
                                       precision=settings.precision, pick=pick)
    answers = [Answer.of(y, context.extract, why, tokenizer.eos_id) for y, why in zip(sampled, reasons)]
    kept = [i for i, answer in enumerate(answers) if answer]
    if len(kept) < size / 10 and not size < settings.chunk < n:  # what is left at the end may be unlucky
        raise NoAnswers(f"only {len(kept)} of {size} completions of the teacher have an extractable answer; "
                        "train the teacher longer, or check that its prompt and the extractor fit together")
    parts = []
    at_once = answers_at_once(teacher.config.vocab_size, len(prompts), settings)
    for rows in (kept[first : first + at_once] for first in range(0, len(kept), at_once)):
        some, views = [answers[i] for i in rows], [[view[i] for i in rows] for view in prompts]
        soft = (picked_labels(some, [made[0][i] for i in rows], settings) if pick
                else second_pass(teacher, views, some, settings, generator))
        students = tokenizer.encode_all([context.student(inputs[i]) for i in rows])
        labelled = with_stops(some, soft, tokenizer.eos_id)
        parts.append(Examples(Ragged.of(students), *labelled, Ragged.of_texts([inputs[i] for i in rows])))
    return Examples.join(parts) if parts else Examples.none()


def answers_at_once(vocabulary: int, prompts: int, settings: PracticeSettings) -> int:
    """How many answers are labelled together: their logits, under all prompts, have to be in memory."""
    logits = settings.max_new_tokens * vocabulary * (prompts + 1)
    return max(1, min(LABELLED_AT_ONCE, LOGITS_AT_ONCE // logits))


@dataclass
class Answer:
    """f(y): what the student learns to write, and how it learns to stop."""

    completion: list[int]  # y, with the token that ended it if it ended by itself
    kept: slice  # of the completion
    cut: bool  # f cut off what follows: the student must stop where the teacher went on

    @classmethod
    def of(cls, y: list[int], extract: Extractor, why: str, eos: int | None) -> Answer | None:
        """f's slice of y, whose last token is the one that ended it if `why` is "eos"; f does not see that.

        If f keeps y to its end, that token is one of y like any other, or y was cut at max_new_tokens: then
        the teacher did not stop, and the student does not learn to. `eos` follows where f cuts something off.
        None where there is nothing to learn. Raises ValueError for a slice with a step.
        """
        ended = why == "eos"
        text = y[: len(y) - ended]
        if (found := extract(text)) is None:
            return None
        if found.step not in (None, 1):
            raise ValueError(f"the extractor returned {found}; f keeps neighbouring tokens, without a step")
        kept = slice(*found.indices(len(text)))
        cut = kept.stop < len(text)
        answer = (cls(text, kept, eos is not None) if cut else
                  cls(y, slice(kept.start, kept.stop + ended), False))
        return answer if answer.completion[answer.kept] or answer.cut else None


def second_pass(teacher: nn.Module, prompts: list[list[list[int]]], answers: list[Answer],
                settings: PracticeSettings, generator: torch.Generator) -> SoftLabels:
    """The labels of all tokens that f kept, from the teacher's logits as it reads y under its prompts."""
    logits = ensemble_logits(teacher, prompts, [a.completion for a in answers], [a.kept for a in answers],
                             settings.precision)
    return soft_labels(torch.cat(logits), settings, generator)


def ensemble_logits(teacher: nn.Module, prompts: list[list[list[int]]], completions: list[list[int]],
                    slices: list[slice], precision: str | None = None) -> list[Tensor]:
    """The teacher's logits at the tokens that f kept, [T, V] for each completion.

    Under several prompts: the log of the average of its probabilities (paper, appendix B.5, "long contexts").
    """
    heads = [y[: s.stop] for y, s in zip(completions, slices)]  # what follows f(y) has no influence on it
    views = [score(teacher, view, heads, keep=slices, precision=precision) for view in prompts]
    if len(views) == 1:
        return views[0]
    return [torch.stack(rows).log_softmax(-1).logsumexp(0) - math.log(len(rows)) for rows in zip(*views)]


def with_stops(answers: list[Answer], labels: SoftLabels, eos: int | None) -> tuple[Ragged, SoftLabels]:
    """What f kept, and the labels of all its tokens. Where f cut something off, a stop token follows.

    That one has a hard label: the teacher went on there, so its distribution says nothing about stopping.
    """
    tokens = [answer.completion[answer.kept] for answer in answers]
    stop = SoftLabels.one_hot(torch.tensor([eos] if eos is not None else []))
    soft = labels.split([len(row) for row in tokens])
    parts = [part for row, answer in zip(soft, answers) for part in ((row, stop) if answer.cut else (row,))]
    rows = [[*row, eos] if answer.cut else row for row, answer in zip(tokens, answers)]
    return Ragged.of(rows), SoftLabels.join(parts)


def picker(settings: PracticeSettings, prompts: int, generator: torch.Generator) -> Pick | None:
    """How each step's logits give the next token and its label; None where they cannot give both.

    That is: where several prompts teach together, at a temperature other than the labels' 1, and where the
    labels are too large to keep at every step.
    """
    if prompts > 1 or settings.temperature != 1:
        return None
    if settings.labels == "sampled" and settings.label_samples <= KEPT_MOST:
        def pick(logits: Tensor) -> tuple[Tensor, ...]:
            drawn = draw(logits, 1 + settings.label_samples, generator)
            return drawn[:, 0], drawn[:, 1:].int()
        return pick
    if settings.labels == "top" and settings.label_top <= KEPT_MOST:
        return lambda logits: (draw(logits, 1, generator)[:, 0], *likeliest(logits, settings.label_top))
    return None


def picked_labels(answers: list[Answer], made: list[tuple[Tensor, ...]],
                  settings: PracticeSettings) -> SoftLabels:
    """The labels of all tokens that f kept, from what the pick of `picker` made at each step."""
    kept = [torch.cat([steps[a.kept] for steps, a in zip(column, answers)]) for column in zip(*made)]
    return SoftLabels.of_draws(*kept) if settings.labels == "sampled" else SoftLabels.of_probabilities(*kept)


def soft_labels(logits: Tensor, settings: PracticeSettings, generator: torch.Generator) -> SoftLabels:
    """Logits [M, V] → M labels of the kind that `settings.labels` names."""
    if settings.labels == "sampled":
        return SoftLabels.sample(logits, settings.label_samples, generator)
    return SoftLabels.top(logits, settings.label_top if settings.labels == "top" else 0)


def combine_seeds(seeds: tuple[int, ...]) -> int:
    """Several seeds → one."""
    return functools.reduce(lambda a, b: a * 1_000_003 + b, seeds) % 2**63


def distill(student: nn.Module, items: Examples, settings: FitSettings = FitSettings(), *,
            epochs: float = 1.0, seed: int = 0, checkpoint: Path | None = None, save_every: float = 30.0,
            name: str = "distill", evaluate: Callable[[int, int], None] | None = None) -> list[float]:
    """Fit p_θ(f(y) | T_s(x)) to the labels, in place (equation 1, `settings.loss`); returns the loss curve.

    An epoch is len(items) // batch_size steps, without the items that are left. `evaluate(step, steps)` is
    called every 20 steps and at the last one, where it may set other weights. Raises ValueError for items
    that the model cannot read (`Examples.check`) or whose labels the loss cannot use, and what `fit` raises.
    """
    items.check(student.config.vocab_size, getattr(student.config, "max_positions", math.inf))
    check_labels(settings.loss, items.labels.kind)
    batches = Epochs(items, settings.batch_size, epochs, seed, student.config.pad_token_id)
    return fit(student, batches, settings, seed=seed, checkpoint=checkpoint, save_every=save_every, name=name,
               evaluate=evaluate and (lambda step: evaluate(step, len(batches))))
