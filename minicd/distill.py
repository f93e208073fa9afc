"""Context distillation: Ω = (D, T_teacher, T_student, f), the practice pass, and the distillation pass (paper, section 2)."""

from __future__ import annotations

import functools
import math
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .runtime.files import atomic_safetensors
from .labels import Examples, LabelBatch, Ragged, SoftLabels
from .losses import LABELS
from .sampling import generate, score
from .tokenizer import TextTokenizer
from .training import Epochs, FitSettings, fit

LABELLED_AT_ONCE = 512  # answers whose logits are in memory together
Template = Callable[[str], str]
Extractor = Callable[[list[int]], slice | None]


@dataclass
class Context:
    """The four components of one context-distillation operation (paper, section 2.1)."""

    inputs: Callable[[int, np.random.Generator], list[str]]  # D: draws n raw task inputs
    teacher: Template | Sequence[Template]  # T_t: the rich prompt; several are an ensemble, whose probabilities are averaged
    student: Template  # T_s: the minimal prompt
    extract: Extractor  # f: which tokens of a completion are the answer; None: there is no answer in it

    @property
    def teachers(self) -> list[Template]:
        return [self.teacher] if callable(self.teacher) else list(self.teacher)


def everything(completion: list[int]) -> slice:
    """The extractor f(y) = y."""
    return slice(None)


@dataclass
class PracticeSettings:
    """How the teacher practises. The paper: temperature 1, 100 samples a soft label (section 2.4)."""

    labels: str = "sampled"  # sampled: the empirical label; top: the most likely tokens; exact: the whole distribution
    label_samples: int = 100  # of a sampled label
    label_top: int = 16  # tokens of a top label
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
                   seed: tuple[int, ...], name: str) -> Examples:
    """One chunk of `practice`: two passes, `generate` draws y and `label` asks for the teacher's distributions at f(y)."""
    device = next(teacher.parameters()).device
    generator = torch.Generator(device).manual_seed(fold(seed))
    rng = np.random.default_rng(seed)
    inputs = context.inputs(n, rng)
    prompts = [tokenizer.encode_all([template(x) for x in inputs]) for template in context.teachers]
    drawn_from = rng.integers(len(prompts), size=n) if len(prompts) > 1 else [0] * n  # one prompt of an ensemble samples y
    completions = generate(teacher, [prompts[k][i] for i, k in enumerate(drawn_from)], settings.max_new_tokens,
                           settings.temperature, generator=generator, progress=name)
    found = [context.extract(y) for y in completions]
    slices = [s and slice(*s.indices(len(y))) for y, s in zip(completions, found)]  # open and negative ends made plain
    kept = [i for i, s in enumerate(slices) if s is not None]
    parts = []
    for start in range(0, len(kept), LABELLED_AT_ONCE):
        rows = kept[start : start + LABELLED_AT_ONCE]
        logits = ensemble_logits(teacher, [[p[i] for i in rows] for p in prompts], [completions[i] for i in rows],
                                 [slices[i] for i in rows])
        students = tokenizer.encode_all([context.student(inputs[i]) for i in rows])
        answers = [completions[i][slices[i]] for i in rows]
        parts.append(label(students, answers, logits, tokenizer.eos_id, settings, generator))
    return Examples.join(parts) if parts else Examples.hard([], [])


def ensemble_logits(teacher: nn.Module, prompts: list[list[list[int]]], completions: list[list[int]],
                    slices: list[slice]) -> list[torch.Tensor]:
    """The teacher's logits at the tokens that f kept, [T, V] for each completion.

    Under several prompts: the logarithm of the average of its probabilities (paper, section 3.3, "long contexts").
    """
    heads = [y[: s.stop] for y, s in zip(completions, slices)]  # what follows f(y) has no influence on it
    views = [score(teacher, view, heads, keep=slices) for view in prompts]
    if len(views) == 1:
        return views[0]
    return [torch.stack(rows).log_softmax(-1).logsumexp(0) - math.log(len(rows)) for rows in zip(*views)]


def label(prompts: list[list[int]], answers: list[list[int]], logits: list[torch.Tensor], eos: int, settings: PracticeSettings,
          generator: torch.Generator) -> Examples:
    """Soft labels for every token of every answer, and a hard one for the stop token that f cut off.

    Without it the student would not learn to stop.
    """
    soft = soft_labels(torch.cat(logits), settings, generator)
    lengths = torch.tensor([len(a) for a in answers])
    stops = lengths.cumsum(0) + torch.arange(len(answers))  # where each answer's stop token stands
    is_stop = torch.zeros(int(lengths.sum()) + len(answers), dtype=torch.bool)
    is_stop[stops] = True
    # one label a stop token after all soft ones, then every label put in its place
    joined = SoftLabels.join([soft, SoftLabels.one_hot(torch.full((len(answers),), eos))])
    source = torch.where(is_stop, len(soft.ids) + is_stop.cumsum(0) - 1, (~is_stop).cumsum(0) - 1)
    return Examples(Ragged.of(prompts), Ragged.of([[*a, eos] for a in answers]), joined.take(source))


def soft_labels(logits: torch.Tensor, settings: PracticeSettings, generator: torch.Generator) -> SoftLabels:
    """Logits [M, V] → M labels of the kind that `settings.labels` names."""
    if settings.labels == "sampled":
        return SoftLabels.sample(logits, settings.label_samples, generator)
    if settings.labels not in ("top", "exact"):
        raise ValueError(f"labels {settings.labels!r} are unknown; known: sampled, top, exact")
    return SoftLabels.top(logits, settings.label_top if settings.labels == "top" else 0)


def fold(seed: tuple[int, ...]) -> int:
    """Several seeds → one."""
    return functools.reduce(lambda a, b: a * 1_000_003 + b, seed) % 2**63


def distill(student: nn.Module, items: Examples, settings: FitSettings = FitSettings(loss="empirical"), *,
            epochs: float = 1.0, seed: int = 0, checkpoint: Path | None = None, save_every: float = 30.0,
            name: str = "distill") -> list[float]:
    """Fit p_θ(f(y) | T_s(x)) to the labels, in place (equation 1; the loss is `settings.loss`). Returns the loss curve.

    Raises ValueError where the loss needs other labels than the items have or the items are another tokenizer's, and what
    `fit` raises.
    """
    items.check_ids(student.config.vocab_size)
    check_labels(settings.loss, sampled=not items.labels.weights.is_floating_point())
    batches = Epochs(items, settings.batch_size, epochs, seed, student.config.pad_token_id)
    return fit(student, batches, settings, seed=seed, checkpoint=checkpoint, save_every=save_every, name=name)


def check_labels(loss: str, sampled: bool) -> None:
    if sampled and LABELS.get(loss, "sampled") != "sampled":
        raise ValueError(f"the loss {loss!r} needs exact or top-k labels, but these are sampled")


def check_on_policy(context: Context) -> None:
    """Raises ValueError where f is not the identity: the student writes no scratchpad that could be cut off."""
    if context.extract is not everything:
        raise ValueError("on-policy distillation needs the identity as its extractor: the teacher judges the student's whole "
                         "answer, from which nothing can be cut off")


class OnPolicy:
    """Batches on which the student answers and the teacher, under its own prompt, labels every token of that answer.

    Then the student learns where its own mistakes lead (Agarwal et al., 2024), usually with the loss `reverse` or `jsd`.
    Several contexts take turns. Raises ValueError where an extractor is not the identity.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, tokenizer: TextTokenizer,
                 context: Context | Sequence[Context], settings: PracticeSettings, *, steps: int, batch_size: int, seed: int = 0):
        self.contexts = [context] if isinstance(context, Context) else list(context)
        for each in self.contexts:
            check_on_policy(each)
        self.student, self.teacher, self.tokenizer = student, teacher, tokenizer
        self.settings, self.steps, self.batch_size, self.seed = settings, steps, batch_size, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, LabelBatch]:
        seed, eos, context = (self.seed, step), self.tokenizer.eos_id, self.contexts[step % len(self.contexts)]
        generator = torch.Generator(next(self.student.parameters()).device).manual_seed(fold(seed))
        inputs = context.inputs(self.batch_size, np.random.default_rng(seed))
        prompts = self.tokenizer.encode_all([context.student(x) for x in inputs])
        sampled, reasons = generate(self.student, prompts, self.settings.max_new_tokens, self.settings.temperature,
                                    generator=generator, reasons=True)
        answers = [[*y, eos] if why == "eos" else y for y, why in zip(sampled, reasons)]
        views = [self.tokenizer.encode_all([template(x) for x in inputs]) for template in context.teachers]
        logits = ensemble_logits(self.teacher, views, answers, [slice(0, len(a)) for a in answers])
        labels = soft_labels(torch.cat(logits), self.settings, generator)
        examples = Examples(Ragged.of(prompts), Ragged.of(answers), labels)
        return examples.batch(torch.arange(len(prompts)), self.student.config.pad_token_id)


@dataclass
class RoundSettings:
    """One round of `rounds`: practice, then distillation."""

    practice: PracticeSettings = field(default_factory=PracticeSettings)
    fit: FitSettings = field(default_factory=lambda: FitSettings(loss="empirical"))
    items: int = 4096  # practice inputs for each context
    epochs: float = 1.0
    on_policy: bool = False  # as many answers as items × epochs, each by the student of that moment


def rounds(model: nn.Module, tokenizer: TextTokenizer, schedule: Sequence[Sequence[Context | str]],
           settings: RoundSettings | None = None, *, contexts: dict[str, Context] | None = None, recursive: bool = False,
           seed: int = 0, folder: Path | None = None) -> nn.Module:
    """Distil round after round; `model` stays as it is, the student of the last round is returned.

    A round is a list of contexts, learnt simultaneously: L(θ) = Σ_k L_Ωk(θ) (equation 2). Rounds follow each other,
    θ_{n+1} = argmin L_Ωn(θ) from θ_n (equation 3), taught by `model`, or with `recursive` by the student of the round before.
    Contexts may be named, as in `contexts`. With `folder`, a rerun goes on at the round and step where it was stopped.
    Raises ValueError for a name that is not in `contexts`, and what `practice` and `fit` raise.
    """
    settings, student = settings or RoundSettings(), deepcopy(model)
    for number, names in enumerate(resolved(schedule, contexts or {})):
        teacher = student if recursive else model
        one_round(teacher, student, tokenizer, names, settings, fold((seed, number)), folder and folder / f"round-{number}")
    return student


def resolved(schedule: Sequence[Sequence[Context | str]], contexts: dict[str, Context]) -> list[list[Context]]:
    unknown = sorted({c for round_ in schedule for c in round_ if isinstance(c, str) and c not in contexts})
    if unknown or not schedule or not all(schedule):
        known = f"; known: {', '.join(contexts)}" if contexts else ""
        raise ValueError(f"the schedule names unknown contexts: {', '.join(unknown)}{known}" if unknown else
                         "the schedule has no round, or a round without a context")
    return [[contexts[c] if isinstance(c, str) else c for c in round_] for round_ in schedule]


def one_round(teacher: nn.Module, student: nn.Module, tokenizer: TextTokenizer, contexts: list[Context], settings: RoundSettings,
              seed: int, folder: Path | None) -> None:
    """Practise under every context, mix, and fit the student in place; its finished weights are kept in `folder`."""
    done = folder and folder / "student.safetensors"
    if done and done.exists():
        load_state(student, done)
        return
    progress = folder and folder / "progress.safetensors"
    check_labels(settings.fit.loss, settings.practice.labels == "sampled")
    if settings.on_policy:
        judge = deepcopy(teacher) if teacher is student else teacher
        steps = max(1, round(settings.items * len(contexts) * settings.epochs / settings.fit.batch_size))
        batches = OnPolicy(student, judge, tokenizer, contexts, settings.practice, steps=steps,
                           batch_size=settings.fit.batch_size, seed=seed)
        fit(student, batches, settings.fit, seed=seed, checkpoint=progress, name="on-policy")
    else:
        parts = [practice(teacher, tokenizer, context, settings.items, settings.practice, seed=fold((seed, k)),
                          folder=folder and folder / f"practice-{k}") for k, context in enumerate(contexts)]
        distill(student, Examples.join(parts), settings.fit, epochs=settings.epochs, seed=seed, checkpoint=progress)
    if done:
        atomic_safetensors(done, student.state_dict())
        progress.unlink(missing_ok=True)


def load_state(model: nn.Module, path: Path) -> None:
    """Raises ValueError where the file is damaged or another model's."""
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is damaged or another model's ({reason}); delete it to train anew") from None
