"""How well a model adds: exact match on unseen questions, for the table of addition.py and for eval.py."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ...labels import Examples
from ...metrics import exact_match
from ...sampling import generate
from ...tokenizer import TextTokenizer
from ..settings import EvalSettings, option
from .addition_questions import (FORMS, answer, carry_run, digits, final_answer, joined, longest_scratchpad,
                                 split_of, test_questions)
from .inputs import tell_unknown_words


@dataclass
class Score:
    """How a model did on a list of questions."""

    accuracy: float  # percent, exact match
    tokens: float  # mean number of prompt and completion tokens a question
    by_digits: dict[str, float]  # percent
    by_carry_run: dict[str, float]  # percent


def evaluate(model: nn.Module, tokenizer: TextTokenizer, questions: list[str], step_by_step: bool,
             max_new_tokens: int, progress: str = "evaluate", precision: str | None = "auto",
             form: str = "compact") -> dict[str, Any]:
    """Exact match of greedy answers, with or without the scratchpad: a Score as a dictionary."""
    template = FORMS[form].teacher if step_by_step else FORMS[form].student
    prompts = tokenizer.encode_all([template(q) for q in questions])
    completions = generate(model, prompts, max_new_tokens, temperature=0, progress=progress,
                           precision=precision)
    extract = final_answer(tokenizer) if step_by_step else lambda tokens: slice(0, len(tokens))
    right = np.zeros(len(questions))
    for i, (question, tokens) in enumerate(zip(questions, completions)):
        found = extract(tokens)
        text = tokenizer.decode(tokens[found]) if found else ""
        right[i] = exact_match("".join(text.split()), joined(answer(question)))
    tokens_used = np.mean([len(p) + len(c) + 1 for p, c in zip(prompts, completions)])
    groups = [grouped(right, [of(question) for question in questions]) for of in (digits, carry_run)]
    return asdict(Score(100 * right.mean(), float(tokens_used), *groups))


def grouped(right: np.ndarray, keys: list[int]) -> dict[str, float]:
    """Percent right for each key."""
    return {str(k): round(100 * float(right[np.array(keys) == k].mean()), 2) for k in sorted(set(keys))}


# --- eval.py ---


@dataclass
class AdditionEval(EvalSettings):
    """How eval.py examines a model that adds."""

    step_by_step: bool = option(False, "ask for a scratchpad, as of the teacher")
    questions: int = option(10_000, "unseen questions", least=1, most=10**6)
    max_digits: int | None = option(None, "longest operands; those of the model's run unless told otherwise",
                                    least=1, most=18, unit="digits")
    scratchpad: str | None = option(None, "how questions are written; as in the model's run unless told "
                                    "otherwise", choices=FORMS)
    max_new_tokens: int | None = option(None, "longest completion; unless told otherwise, what the longest "
                                        "scratchpad needs", least=1, most=4096, unit="tokens")

    @property
    def form(self) -> str:
        return self.scratchpad or "compact"

    def longest(self, tokenizer: TextTokenizer, max_digits: int) -> int:
        return self.max_new_tokens or longest_scratchpad(tokenizer, self.form, max_digits) + 4


def ask(model: nn.Module, tokenizer: TextTokenizer, question: str, settings: AdditionEval) -> str:
    """`eval.py --ask`: the completion for '12 + 34'. Raises ValueError for anything but an addition."""
    sides = [side.strip() for side in question.split("+")]
    if len(sides) != 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise ValueError(f"--ask {question!r}: ask for the sum of two numbers, "
                         "for example '31415926 + 27182818'")
    spaced = " + ".join(" ".join(side) for side in sides)
    form = FORMS[settings.form]
    prompt = (form.teacher if settings.step_by_step else form.student)(spaced)
    tell_unknown_words(tokenizer, prompt)
    longest = settings.longest(tokenizer, max(map(len, sides)))
    answers = generate(model, [tokenizer.encode(prompt)], longest, temperature=0,
                       precision=settings.precision)
    text = tokenizer.decode(answers[0])
    return text if settings.step_by_step else text.replace(" ", "")


def examine(model: nn.Module, tokenizer: TextTokenizer, settings: AdditionEval, folder: Path) -> str:
    """`eval.py`: accuracy on the table's unseen questions, none of which the model has practised."""
    longest, form = settings.max_digits or 8, settings.form
    questions = test_questions(settings.questions, longest)
    check_unseen(questions, folder.parent, tokenizer, form)
    score = evaluate(model, tokenizer, questions, settings.step_by_step, settings.longest(tokenizer, longest),
                     precision=settings.precision, form=form)
    return (f"exact match on {len(questions)} unseen questions of up to {longest} digits: "
            f"{score['accuracy']:.2f} %, "
            f"{score['tokens']:.1f} tokens a question\n"
            f"by digits: {score['by_digits']}\nby longest carry run: {score['by_carry_run']}")


def check_unseen(questions: list[str], run: Path, tokenizer: TextTokenizer, form: str) -> None:
    """Raises ValueError where the practice set of the model's run holds a test question."""
    assert all(split_of(q) == "test" for q in questions)
    path = run / "practice.safetensors"
    if path.exists():
        practised = Examples.load(path).prompts
        prompts = {tuple(practised[i]) for i in range(len(practised))}
        if any(tuple(tokenizer.encode(FORMS[form].student(q))) in prompts for q in questions):
            raise ValueError(f"{path} holds test questions: the model has practised them, "
                             "so its score would mean nothing")
