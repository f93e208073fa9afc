"""One practice item, whole: what a run shows before it begins, and its record keeps."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import nn

from ..distill import Answer, Context, PracticeSettings, ensemble_logits, soft_labels
from ..labels import SoftLabels
from ..sampling import generate
from ..tokenizer import TextTokenizer
from .report import beneath


def one_item(context: Context, tokenizer: TextTokenizer, teacher: nn.Module, settings: PracticeSettings,
             seed: int) -> str:
    """What the teacher sees and says, what f keeps of it, what the student sees, and the first soft label."""
    generator = torch.Generator(next(teacher.parameters()).device).manual_seed(seed)
    x = context.inputs(1, np.random.default_rng((seed, 5)))[0]
    prompt = tokenizer.encode(context.teachers[0](x))
    [completion], [reason] = generate(teacher, [prompt], settings.max_new_tokens, settings.temperature,
                                      generator=generator, reasons=True, precision=settings.precision,
                                      keep_end=True)
    answer = Answer.of(completion, context.extract, reason, tokenizer.eos_id)
    kept = answer.completion[answer.kept] if answer else []
    said = completion[: len(completion) - (reason == "eos")]
    parts = {"teacher prompt": context.teachers[0](x), "completion": tokenizer.decode(said),
             "extracted answer": tokenizer.decode(kept) if answer else "(none)",
             "student prompt": context.student(x)}
    if unknown := tokenizer.unknown_words(parts["teacher prompt"]):
        parts["unknown words"] = ", ".join(map(repr, unknown))
    if kept:
        logits = ensemble_logits(teacher, [[prompt]], [answer.completion], [answer.kept],
                                 settings.precision)[0][:1]
        parts["its first label"] = label_text(tokenizer, soft_labels(logits, settings, generator))
    return f"\nOne practice item\n{beneath(parts)}\n"


def shortened(item: str, longest: int = 15, first: int = 6, last: int = 5) -> str:
    """Without the middle of its long texts, whose examples may be a data set's."""
    parts = [part.split("\n") for part in re.split(r"\n(?=  \S)", item)]
    gaps = [f"{20 * ' '}[{len(lines) - first - last} lines left out]" for lines in parts]
    return "\n".join(line for lines, gap in zip(parts, gaps) for line in (
        lines if len(lines) <= longest else [*lines[:first], gap, *lines[-last:]]))


def label_text(tokenizer: TextTokenizer, labels: SoftLabels) -> str:
    """The likeliest tokens of the first label, with their shares."""
    weights = labels.weights[: int(labels.ids.starts[1])]
    shares = (weights / (1 if weights.is_floating_point() else weights.sum())).tolist()
    ranked = sorted(zip(shares, tokenizer.pieces(labels.ids[0])), reverse=True)
    return ", ".join(f"{token!r} {share:.2f}" for share, token in ranked[:5])
