"""Addition questions as strings: the distribution D, both templates, scratchpads, the extractor f, splits.

A question is '1 2 + 3 4': digits with spaces between them, most significant first, operands of equal length.
A `Form` writes it down for a model: `lines` without the spaces, for tokenizers with a token for each digit.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import Callable, Iterator

import numpy as np

from ...distill import Context, Extractor
from ...tokenizer import TextTokenizer

# A hash of its text puts a question into a split: no question is ever in two, whatever the seed or the run.
SPLITS = {"train": range(0, 10), "validation": range(10, 20), "test": range(20, 30),
          "practice": range(30, 100)}


def teacher_template(question: str) -> str:
    """T_t: asks for the scratchpad."""
    return f"add step by step : {question}"


def student_template(question: str) -> str:
    """T_s: asks for the answer alone."""
    return f"add : {question}"


def answer(question: str) -> str:
    """'1 2 + 3 4' → '4 6'."""
    a, b = question.replace(" ", "").split("+")
    return " ".join(str(int(a) + int(b)))


def columns(question: str) -> Iterator[tuple[int, int, int, int]]:
    """Both digits, the carry and the sum of the three, last column first."""
    a, b = (side.split() for side in question.split("+"))
    carry = 0
    for x, y in zip(reversed(a), reversed(b)):
        total = int(x) + int(y) + carry
        yield int(x), int(y), carry, total
        carry = total // 10


def compact_scratchpad(question: str) -> str:
    """One step a column, last column first: '1 2 + 3 4' → '2 4 C: 0 => 6 , 1 3 C: 0 => 4 , C: 0 # 4 6 #'."""
    steps = []
    for x, y, carry, total in columns(question):
        steps.append(f"{x} {y} C: {carry} => {total % 10} ,")
    return " ".join([*steps, f"C: {total // 10} # {answer(question)} #"])


def nye_scratchpad(question: str) -> str:
    """The paper's format (Nye et al., 2021): a step repeats the rest of the operands, the result, the carry.

    We add spaces around the two #: T5's tokenizer has tokens such as "#1", which no slice can cut.
    """
    a, b = (side.split() for side in question.split("+"))
    result, lines = [], [f"{question} , C: 0"]
    for left, (*_, total) in zip(reversed(range(len(a))), columns(question)):
        result = [str(total % 10), *result]
        rest = f"{' '.join(a[:left])} + {' '.join(b[:left])} " if left else ""
        lines.append(f"{rest}, {' '.join(result)} C: {total // 10}")
    last = " ".join([str(total // 10), *result])
    return " => ".join([*lines, last]) + f" Final answer: # {answer(question)} #"


def lines_scratchpad(question: str) -> str:
    """One line a column, last column first: both digits and the carry: '5 + 5' → '5+5+0=10', '#10#'."""
    lines = [f"{x}+{y}+{carry}={total:02}" for x, y, carry, total in columns(question)]
    return "\n".join([*lines, f"#{joined(answer(question))}#"])


def joined(text: str) -> str:
    """'1 2 + 3 4' → '12+34'"""
    return text.replace(" ", "")


@dataclass(frozen=True)
class Form:
    """How the experiment is written down: functions of a question."""

    scratchpad: Callable[[str], str]
    teacher: Callable[[str], str] = teacher_template
    student: Callable[[str], str] = student_template
    answer: Callable[[str], str] = answer


FORMS = {"compact": Form(compact_scratchpad), "nye": Form(nye_scratchpad), "lines": Form(
    lines_scratchpad, lambda q: f"Add step by step: {joined(q)}\n", lambda q: f"Add: {joined(q)}=",
    lambda q: joined(answer(q)))}


def longest_scratchpad(tokenizer: TextTokenizer, form: str, max_digits: int) -> int:
    """An upper bound in tokens, as if every digit were the longest: T5 writes 0 as two tokens."""
    nines = " ".join("9" * max_digits)
    scratchpad = FORMS[form].scratchpad(f"{nines} + {nines}")
    return max(len(tokenizer.encode(re.sub(r"\d", digit, scratchpad))) for digit in "0123456789")


def final_answer(tokenizer: TextTokenizer) -> Extractor:
    """f: the slice of the tokens between the last two # of a completion; None where they are no number."""
    pieces = [piece.strip(" ") for piece in tokenizer.pieces(range(len(tokenizer)))]
    marks = {i for i, piece in enumerate(pieces) if piece == "#"}
    digits = {i for i, piece in enumerate(pieces) if piece in set("0123456789")}
    blanks = {i for i, piece in enumerate(pieces) if not piece}  # T5's token for a lone space

    def extract(tokens: list[int]) -> slice | None:
        ends = [i for i, token in enumerate(tokens) if token in marks][-2:]
        if len(ends) < 2 or ends[1] - ends[0] < 2:
            return None
        found = slice(ends[0] + 1, ends[1])
        kept = set(tokens[found])
        return found if kept & digits and kept <= digits | blanks else None

    return extract


def split_of(question: str) -> str:
    bucket = zlib.crc32(question.encode()) % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def draw_questions(n: int, max_digits: int, split: str, rng: np.random.Generator,
                   unique: bool = True) -> list[str]:
    """D: n questions of one split, with operands of equal length, uniform in 1…max_digits.

    Unique questions exhaust the short lengths, as in the authors' code. Practice questions repeat: short ones
    stay frequent. Raises ValueError where n unique questions are more than about half of what a split holds.
    """
    if not 1 <= max_digits <= 18:  # more do not fit into NumPy's integers
        raise ValueError(f"operands have 1 to 18 digits, not {max_digits}")
    if unique and n > 0.05 * 81 * 100 ** (max_digits - 1):
        raise ValueError(f"{n} different questions of at most {max_digits} digits are too many "
                         f"for the {split} split; ask for fewer or for more digits")
    questions: list[str] = []
    seen: set[str] = set()
    while len(questions) < n:
        for question in random_questions(2 * n, max_digits, rng):
            if split_of(question) == split and not (unique and question in seen):
                questions.append(question)
                seen.add(question)
                if len(questions) == n:
                    break
    return questions


def random_questions(n: int, max_digits: int, rng: np.random.Generator) -> list[str]:
    lengths = rng.integers(1, max_digits + 1, size=n)
    low = np.where(lengths == 1, 0, 10 ** (lengths - 1))
    operands = rng.integers(low, 10**lengths, size=(2, n)).T
    return [f"{' '.join(str(a))} + {' '.join(str(b))}" for a, b in operands.tolist()]


def addition_context(tokenizer: TextTokenizer, max_digits: int, form: str = "compact") -> Context:
    """The whole experiment as Ω = (D, T_t, T_s, f)."""
    def inputs(n: int, rng: np.random.Generator) -> list[str]:
        return draw_questions(n, max_digits, "practice", rng, unique=False)
    return Context(inputs, FORMS[form].teacher, FORMS[form].student, final_answer(tokenizer))


def digits(question: str) -> int:
    """The length of its operands: '1 2 + 3 4' → 2."""
    return len(question.split("+")[0].split())


def carry_run(question: str) -> int:
    """The longest run of neighbouring columns that carry: '9 5 + 0 5' → 2."""
    run = longest = 0
    for *_, total in columns(question):
        run = run + 1 if total > 9 else 0
        longest = max(longest, run)
    return longest


def test_questions(n: int, max_digits: int) -> list[str]:
    """The unseen questions of the table: the same for every seed and every model."""
    return draw_questions(n, max_digits, "test", np.random.default_rng(2022))
