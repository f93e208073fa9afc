"""What a student of own.py gained and forgot, with 95 % intervals over the inputs."""

from __future__ import annotations

import math
import time
from typing import Any, Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ...distill import Answer, Context, ensemble_logits
from ...metrics import exact_match, rouge_l
from ...sampling import generate, score
from ...tokenizer import TextTokenizer
from ..report import beneath, table
from .contexts_file import Named
from .forgetting import compare
from .inputs import TRIES, finished_inputs, until_enough
from .natural_instructions import inputs_prompt

TIMED, SHOTS, LONGEST_INPUT = 8, 6, 128
RULES = {"ends_with": "how it ends", "never": "what it never says", "pattern": "its form", "rules": "all"}
ROWS = {"kl": "KL(teacher ‖ student) a token, in 1/1000 nat", "agreement": "same likeliest token, %",
        "identical": "answer identical to the teacher's, %", "rouge": "Rouge-L to the teacher's answer",
        "exact": "exact match with the reference, %", "teacher_exact": "… of the teacher",
        **{f"{who}{rule}": title for rule, name in RULES.items()
           for who, title in (("", f"rule kept: {name}, %"), ("teacher_", "… by the teacher"))},
        "reference_rouge": "Rouge-L to the reference", "teacher_reference_rouge": "… of the teacher",
        "tokens_saved": "prompt tokens saved an answer", "milliseconds": "milliseconds an answer",
        "teacher_milliseconds": "… of the teacher", "no_answer": "no answer found in the teacher's text, %",
        "pieces": "a marker's piece in the answer, %",
        "forgotten": "KL(before ‖ now) a token on unrelated prompts, in 1/1000 nat",
        "tasks": "Rouge-L on the pocket's tasks, under their instructions"}
Figures = dict[str, list[float]]


# --- intervals ---


def ratio(sums: Sequence[float], counts: Sequence[float], scale: float = 1.0) -> list[float]:
    """Σ sums / Σ counts, and its 95 % interval: a bootstrap over the inputs, 2,000 times."""
    a, b = np.asarray(sums, float) * scale, np.asarray(counts, float)
    if not b.sum():
        return [0.0, 0.0, 0.0]
    rows = np.random.default_rng(0).integers(len(a), size=(2000, len(a)))
    drawn = a[rows].sum(1) / np.maximum(b[rows].sum(1), 1e-9)
    return [float(a.sum() / b.sum()), *map(float, np.quantile(drawn, [0.025, 0.975]))]


def share(hits: Sequence[bool]) -> list[float]:
    """Percent, and its 95 % interval by Wilson, which is no point at 0 and 100 %."""
    n, z = len(hits), 1.96
    if not n:
        return [0.0, 0.0, 100.0]
    p = float(np.mean(hits))
    middle, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * width) / (1 + z * z / n) for sign in (-1, 1))
    return [100 * p, 100 * max(0.0, low), 100 * min(1.0, high)]


# --- along the teacher's answers ---


def teacher_answers(base: nn.Module, tokenizer: TextTokenizer, context: Context, tests: list[str],
                    settings: Any) -> list[Answer | None]:
    """f of the model's greedy answers under T_t, the first of several; None where f finds nothing."""
    prompts = tokenizer.encode_all([context.teachers[0](x) for x in tests])
    written, reasons = generate(base, prompts, settings.max_new_tokens, 0, reasons=True,
                                precision=settings.precision, progress="teacher's answers", keep_end=True)
    return [Answer.of(y, context.extract, why, tokenizer.eos_id) for y, why in zip(written, reasons)]


def kept_texts(tokenizer: TextTokenizer, answers: list[Answer | None]) -> list[str | None]:
    """f(y) as text, None where there is none."""
    return [tokenizer.decode(a.completion[a.kept]).strip() if a else None for a in answers]


def along_teacher(base: nn.Module, model: nn.Module, tokenizer: TextTokenizer, context: Context,
                  tests: list[str], answers: list[Answer | None], settings: Any) -> Figures:
    """KL(teacher ‖ student) and top-1 agreement at the tokens of the teacher's f(y)."""
    rows = [(x, answer) for x, answer in zip(tests, answers) if answer]
    tokens = [answer.completion[answer.kept] for _, answer in rows]
    students = tokenizer.encode_all([context.student(x) for x, _ in rows])
    divergence, same = compare(lambda some: teacher_logits(base, tokenizer, context, rows[some], settings),
                               lambda some: score(model, students[some], tokens[some],
                                                  precision=settings.precision), tokens, model)
    counts = [len(row) for row in tokens]
    return {"kl": ratio(divergence, counts, 1000), "agreement": ratio(same, counts, 100)}


def teacher_logits(base: nn.Module, tokenizer: TextTokenizer, context: Context,
                   rows: list[tuple[str, Answer]], settings: Any) -> list[Tensor]:
    """Inputs with answers → the teacher's logits at f(y), [T, V] each."""
    views = [tokenizer.encode_all([template(x) for x, _ in rows]) for template in context.teachers]
    answers = [answer for _, answer in rows]
    return ensemble_logits(base, views, [a.completion for a in answers], [a.kept for a in answers],
                           settings.precision)


# --- in its own answers ---


def of_answers(base: nn.Module, model: nn.Module, tokenizer: TextTokenizer, context: Context,
               tests: list[str], answers: list[Answer | None], named: Named, settings: Any) -> Figures:
    """The student's greedy answers beside the teacher's, references and rules; what its short prompt saves.

    Of several teacher's prompts, lengths and times are those of the first.
    """
    prompts = {"teacher": tokenizer.encode_all([context.teachers[0](x) for x in tests]),
               "student": tokenizer.encode_all([context.student(x) for x in tests])}
    answered = generate(model, prompts["student"], settings.max_new_tokens, 0, precision=settings.precision,
                        progress="answers")
    written = [tokenizer.decode(y).strip() for y in answered]
    taught = kept_texts(tokenizer, answers)
    pairs = [(ours, theirs) for ours, theirs in zip(written, taught) if theirs is not None]
    saved = [len(t) - len(s) for t, s in zip(prompts["teacher"], prompts["student"])]
    found = {"identical": share([ours == theirs for ours, theirs in pairs]),
             "rouge": ratio([rouge_l(ours, [theirs]) for ours, theirs in pairs], [1] * len(pairs), 100),
             "tokens_saved": ratio(saved, [1] * len(saved)),
             "no_answer": share([answer is None for answer in answers]),
             **milliseconds(base, model, prompts, settings)}
    if pieces := getattr(context.extract, "pieces", 0):
        found["pieces"] = share([i < pieces for i in range(len(tests))])
    for who, texts in (("", written), ("teacher_", [text or "" for text in taught])):
        found |= {f"{who}{name}": share(hits) for name, hits in kept(named.rules, texts).items()}
    references = named.references
    known = [(ours, theirs or "", references[x]) for x, ours, theirs in zip(tests, written, taught)
             if x in references]
    for name, which in (("", 0), ("teacher_", 1)) if known else ():
        found[f"{name}exact"] = share([any(exact_match(row[which], r) for r in row[2]) for row in known])
        points = [rouge_l(row[which], row[2]) for row in known]
        found[f"{name}reference_rouge"] = ratio(points, [1] * len(known), 100)
    return found


def side_by_side(models: dict[str, nn.Module], tokenizer: TextTokenizer, context: Context, tests: list[str],
                 settings: Any) -> str:
    """Inputs and their greedy answers: the base's under both prompts, the others' under the student's."""
    prompts = tokenizer.encode_all([context.student(x) for x in tests])
    taught = teacher_answers(models["base"], tokenizer, context, tests, settings)
    texts = ["(none)" if text is None else text for text in kept_texts(tokenizer, taught)]
    said = {"input": tests, "base with prompt": texts}
    for name, model in models.items():
        written = generate(model, prompts, settings.max_new_tokens, 0, precision=settings.precision)
        said[name] = [tokenizer.decode(y).strip() or "(nothing)" for y in written]
    rows = [dict(zip(said, row)) for row in zip(*said.values())]
    return "\n\n".join(map(beneath, rows))


def kept(rules: dict[str, Callable[[str], bool]], texts: list[str]) -> dict[str, list[bool]]:
    """Rule → which of the answers keep it; of several also which keep all of them."""
    found = {name: list(map(rule, texts)) for name, rule in rules.items()}
    return found | ({"rules": [all(hits) for hits in zip(*found.values())]} if len(found) > 1 else {})


def milliseconds(base: nn.Module, model: nn.Module, prompts: dict[str, list[list[int]]],
                 settings: Any) -> Figures:
    """Of a greedy answer, one at a time, teacher and student in turns. Other work on the machine shows."""
    spent: dict[str, list[float]] = {"teacher": [], "student": []}
    for i in range(min(TIMED, len(prompts["teacher"]))):
        for name, which in (("teacher", base), ("student", model)):
            start = time.perf_counter()
            generate(which, [prompts[name][i]], settings.max_new_tokens, 0, precision=settings.precision)
            spent[name].append(1000 * (time.perf_counter() - start))
    return {name: ratio(spent[who], [1] * len(spent[who]))
            for name, who in (("milliseconds", "student"), ("teacher_milliseconds", "teacher"))}


# --- D, written by the model ---


@torch.no_grad()
def write_inputs(model: nn.Module, tokenizer: TextTokenizer, examples: list[str], n: int,
                 seed: tuple[int, ...], precision: str | None,
                 prompt: Callable[[Sequence[str]], str] = inputs_prompt) -> list[str]:
    """The examples, and up to n new inputs that the model writes after some of them (section 3.1).

    `prompt` makes of some examples a prompt that one more input continues, to the end of the line.
    Raises ValueError where it writes less than a tenth of them.
    """
    rng = np.random.default_rng((*seed, 11))
    generator = torch.Generator(next(model.parameters()).device).manual_seed(int(rng.integers(2**62)))
    found = {text.casefold(): text for text in examples}

    def ask(size: int) -> list[str]:
        prompts, before = [prompt(rng.permutation(examples)[:SHOTS]) for _ in range(size)], len(found)
        for text in finished_inputs(model, tokenizer, prompts, LONGEST_INPUT, generator, precision,
                                    stop=["\n"]):
            found.setdefault(text.casefold(), text)
        return list(found.values())[before:]

    new = until_enough(n, ask)
    if len(new) < n / TRIES:
        raise ValueError(f"asked for {n} inputs, the model wrote only {len(new)} new ones that end with "
                         "their line; give it more examples, or the inputs themselves")
    return [*examples, *new]


# --- tables ---


def tables(found: dict[str, dict[str, Figures]]) -> str:
    """{before, after or a model's name: {context: figures}} → a table for each context."""
    parts = []
    for name in dict.fromkeys(name for contexts in found.values() for name in contexts):
        columns = [contexts.get(name, {}) for contexts in found.values()]
        rows = [[title, *(cell(column.get(key)) for column in columns)] for key, title in ROWS.items()
                if any(key in column for column in columns)]
        parts.append(f"{name}\n\n{table(['value (95 % interval)', *found], rows)}")
    return "\n\n".join(parts)


def cell(value: list[float] | None) -> str:
    return "" if value is None else f"{value[0]:.1f} ({value[1]:.1f} – {value[2]:.1f})"


def told(found: dict[str, Figures]) -> str:
    """In a line for each context, while the run goes on."""
    keys = ("kl", "agreement", "identical", "rouge", "exact", "rules", "forgotten", "tasks")
    return "\n".join(f"{name}: " + ", ".join(f"{key} {figures[key][0]:.1f}" for key in keys if key in figures)
                     for name, figures in found.items())
