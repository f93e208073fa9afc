"""Rounds: simultaneous (equation 2), sequential (equation 3), recursive; and on-policy batches."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .distill import (Context, PracticeSettings, checksum, combine_seeds, distill, ensemble_logits, identity,
                      practice, soft_labels)
from .labels import Examples, LabelBatch, Ragged, SoftLabels
from .losses import check_labels, source
from .runtime.files import all_tensors, atomic_safetensors, open_safetensors
from .runtime.lora import copy_to_train
from .sampling import generate
from .tokenizer import TextTokenizer
from .training import FitSettings, fit


@dataclass
class RoundSettings:
    """One round of `rounds`: practice, then distillation."""

    practice: PracticeSettings = field(default_factory=PracticeSettings)
    fit: FitSettings = field(default_factory=FitSettings)
    items: int = 4096  # practice inputs for each context
    epochs: float = 1.0
    on_policy: bool = False  # as many answers as items × epochs, each by the student of that moment
    save_every: float = 30.0  # seconds between checkpoints


def rounds(model: nn.Module, tokenizer: TextTokenizer, schedule: Sequence[Sequence[Context]],
           settings: RoundSettings | None = None, *, recursive: bool = False, seed: int = 0,
           folder: Path | None = None, name: str = "",
           evaluate: Callable[[nn.Module, int, int, int], None] | None = None) -> nn.Module:
    """Distil round after round; returns the student of the last round and leaves `model` unchanged.

    A round is a list of contexts, learnt simultaneously: L(θ) = Σ_k L_Ωk(θ) (equation 2), as one mixed set
    in which every token weighs the same; on policy, contexts take turns by batch. The next round
    starts from its student: θ_{n+1} = argmin L_Ωn(θ) from θ_n (equation 3). The teacher is `model`, or with
    `recursive` the student of the round before. With `folder`, a rerun resumes at the round and step where
    it stopped. `name` is the prefix of the progress bars. `evaluate(student, round, step, steps)` is called
    every 20 steps, as in `distill`. With lora_rank, the student shares embeddings and norms with `model`:
    copy it before you train it in another way.
    Raises ValueError where the schedule or a round is empty, or the folder another run's, and what `practice`
    and `fit` raise. A finished round is known by settings, loss, seed and its number of contexts alone: after
    editing one, choose another folder.
    """
    if not schedule or not all(schedule):
        raise ValueError("the schedule has no round, or a round without a context")
    settings = settings or RoundSettings()
    student = copy_to_train(model, settings.fit.lora_rank)
    for number, contexts in enumerate(schedule):
        teacher = student if recursive else model
        one_round(teacher, student, tokenizer, contexts, settings, combine_seeds((seed, number)),
                  folder and folder / f"round-{number}", f"{name} round {number + 1}".strip(),
                  evaluate and partial(evaluate, student, number))
    return student


def one_round(teacher: nn.Module, student: nn.Module, tokenizer: TextTokenizer, contexts: Sequence[Context],
              settings: RoundSettings, seed: int, folder: Path | None, name: str,
              evaluate: Callable[[int, int], None] | None = None) -> None:
    """Practise under every context, mix, and fit the student in place; its final weights go to `folder`."""
    done, made_by = folder and folder / "student.safetensors", described(settings, contexts, seed)
    if done and done.exists():
        load_state(student, done, made_by)
        return
    progress = folder and folder / "progress.safetensors"
    check_labels(settings.fit.loss, settings.practice.labels)
    if settings.on_policy:
        judge = deepcopy(teacher) if teacher is student else teacher
        steps = max(1, round(settings.items * len(contexts) * settings.epochs / settings.fit.batch_size))
        batches = OnPolicy(student, judge, tokenizer, contexts, settings.practice, steps=steps,
                           batch_size=settings.fit.batch_size, seed=seed)
        fit(student, batches, settings.fit, seed=seed, checkpoint=progress, save_every=settings.save_every,
            name=f"{name}, on-policy", evaluate=evaluate and (lambda step: evaluate(step, steps)))
    else:
        parts = [practice(teacher, tokenizer, context, settings.items, settings.practice,
                          seed=combine_seeds((seed, k)), folder=folder and folder / f"practice-{k}",
                          name=f"{name}, practice {k + 1}")
                 for k, context in enumerate(contexts)]
        distill(student, Examples.join(parts), settings.fit, epochs=settings.epochs, seed=seed,
                checkpoint=progress, save_every=settings.save_every, name=f"{name}, distill",
                evaluate=evaluate)
    if done:
        atomic_safetensors(done, student.state_dict(), {"round": made_by})
        progress.unlink(missing_ok=True)


def described(settings: RoundSettings, contexts: Sequence[Context], seed: int) -> str:
    """What a round's student depends on, its teacher and the contexts' functions aside."""
    settings = {key: value for key, value in asdict(settings).items() if key != "save_every"}
    return json.dumps([settings, source(settings["fit"]["loss"]), len(contexts), seed])


def load_state(model: nn.Module, path: Path, made_by: str) -> None:
    """Raises ValueError where the file is damaged, another model's, or of another round."""
    with open_safetensors(path, "is damaged or another model's", "delete it to train anew") as file:
        if (file.metadata() or {}).get("round") not in (None, made_by):
            raise ValueError("it was trained with other settings, contexts, loss or seed")
        like = next(model.parameters())
        state = {name: tensor.to(like.device) for name, tensor in all_tensors(file).items()}
        model.load_state_dict(state, assign=True)  # its parameters may be its teacher's, too


class OnPolicy:
    """Batches that the student answers itself and the teacher, under its own prompt, labels token by token.

    The student learns where its own mistakes lead (Agarwal et al., 2024), usually with the loss `reverse` or
    `jsd`. Several contexts take turns. Raises ValueError where an extractor is not the identity.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, tokenizer: TextTokenizer,
                 context: Context | Sequence[Context], settings: PracticeSettings, *, steps: int,
                 batch_size: int, seed: int = 0):
        self.contexts = [context] if isinstance(context, Context) else list(context)
        for each in self.contexts:
            check_on_policy(each)
        self.student, self.teacher, self.tokenizer = student, teacher, tokenizer
        self.settings, self.steps, self.batch_size, self.seed = settings, steps, batch_size, seed
        self.label_kind = settings.labels

    def __len__(self) -> int:
        return self.steps

    @property
    def digest(self) -> int:
        """Of what an interrupted run must find again: settings, and what the contexts make of an input."""
        first = ((c, c.inputs(self.batch_size, np.random.default_rng((self.seed, k)))[:1])
                 for k, c in enumerate(self.contexts))
        return combine_seeds(tuple(checksum(c, x, asdict(self.settings)) for c, x in first))

    def __getitem__(self, step: int) -> tuple[Tensor, LabelBatch]:
        seed, context = (self.seed, step), self.contexts[step % len(self.contexts)]
        precision = self.settings.precision
        generator = torch.Generator(next(self.student.parameters()).device).manual_seed(combine_seeds(seed))
        inputs = context.inputs(self.batch_size, np.random.default_rng(seed))
        prompts = self.tokenizer.encode_all([context.student(x) for x in inputs])
        answers = generate(self.student, prompts, self.settings.max_new_tokens, self.settings.temperature,
                           generator=generator, precision=precision, keep_end=True)
        views = [self.tokenizer.encode_all([template(x) for x in inputs]) for template in context.teachers]
        logits = ensemble_logits(self.teacher, views, answers, [slice(0, len(a)) for a in answers], precision)
        labels = self.soft_labels(torch.cat(logits), prompts, answers, generator)
        examples = Examples(Ragged.of(prompts), Ragged.of(answers), labels)
        return examples.batch(torch.arange(len(prompts)), self.student.config.pad_token_id)

    def soft_labels(self, logits: Tensor, prompts: list[list[int]], answers: list[list[int]],
                    generator: torch.Generator) -> SoftLabels:
        """The teacher's logits [M, V] at the tokens of the student's answers → their M labels."""
        return soft_labels(logits, self.settings, generator)


def check_on_policy(context: Context) -> None:
    """Raises ValueError where f is not the identity: the student writes no scratchpad to cut off."""
    if context.extract is not identity:
        raise ValueError("on-policy distillation needs minicd.identity as its extractor: the teacher judges "
                         "the student's whole answer, from which nothing can be cut off")
