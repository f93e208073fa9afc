"""What is measured before and after additions are distilled, for transfer.py and for eval.py (hypothesis 7).

Direct addition, Rouge-L on instructions of test tasks, and sums inside word problems. Answers end with their
line, since a plain language model goes on after it with the next example.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import numpy as np
from torch import nn

from ...distill import Template
from ...metrics import rouge_l
from ...runtime.files import read_json
from ...sampling import generate
from ...tokenizer import TextTokenizer
from ..settings import EvalSettings, beside, option
from .addition_questions import FORMS, answer, final_answer, joined, test_questions
from .inputs import tell_unknown_words
from .instruction_eval import TEST, instructed, line_ends
from .instruction_items import SHAPE, load_split
from .natural_instructions import Example, NITask
from .word_problems import Problem, problems, result

DATA = "data/instructions"
FORM = FORMS["lines"]
DESCRIPTION = "Add two numbers."
EXAMPLES = ("4 3 + 8 6", "3 1 3 + 2 0 5")  # in both prompts; of the validation split: never practised
SHOWN = 2  # worked problems in a prompt; the first of the validation split
LONGEST_SUM = 16  # tokens of the answer to a word problem, which may write out the sum
LONGEST_ANSWER = 64  # tokens of that to an instruction, unless settings say otherwise


def teacher_prompt(question: str) -> str:
    """T_t: the task's description and two scratchpads."""
    shown = [FORM.teacher(q) + FORM.scratchpad(q) for q in EXAMPLES]
    return "\n".join([DESCRIPTION, *shown, FORM.teacher(question)])


def student_prompt(question: str) -> str:
    """T_s: the same description and two direct answers."""
    shown = [FORM.student(q) + FORM.answer(q) for q in EXAMPLES]
    return "\n".join([DESCRIPTION, *shown, FORM.student(question)])


def problem_task(definition: str, shown: list[tuple[str, str]]) -> NITask:
    """Word problems as a task of Natural Instructions, with these problems and answers for examples."""
    examples = [Example(text, answer, "") for text, answer in shown]
    return NITask("word_problems", definition, examples, [], [], [])


USUAL_PROMPT = "sums"  # of word problems, where no run has chosen one


def problem_prompts() -> dict[str, Template]:
    """The prompts from which validation chooses: with and without examples, instructions or plain text.

    One has the sums written out in its examples: who answers so has to find both numbers, then add at once.
    """
    shown = problems()["validation"][:SHOWN]
    numbers = problem_task("Solve the problem and answer with a number.", [(p.text, p.answer) for p in shown])
    sums = problem_task("Read the problem. Write the sum that it asks for, and its result.",
                        [(p.text, p.equation) for p in shown])
    examples = "".join(f"{plain(p.text)} {p.answer}\n" for p in shown)
    return {"definition": instructed(numbers, "definition"),
            "definition_and_examples": instructed(numbers, SHAPE), "sums": instructed(sums, SHAPE),
            "plain": plain, "plain_examples": lambda text: examples + plain(text)}


def plain(text: str) -> str:
    return f"Question: {text}\nAnswer:"


# --- measures ---


def complete(model: nn.Module, tokenizer: TextTokenizer, prompts: list[str], longest: int,
             precision: str | None, name: str = "") -> list[str]:
    """Greedy completions, each up to the end of its line."""
    written = generate(model, tokenizer.encode_all(prompts), longest, temperature=0,
                       stop=line_ends(tokenizer), progress=name, precision=precision)
    return [tokenizer.decode(tokens) for tokens in written]


def direct_accuracy(model: nn.Module, tokenizer: TextTokenizer, questions: list[str], precision: str | None,
                    name: str = "") -> float:
    """Percent of the questions that it answers at once, under T_s."""
    longest = max(len(answer(q)) for q in questions) + 2  # a digit is at most a token and its blank
    texts = complete(model, tokenizer, [student_prompt(q) for q in questions], longest, precision, name)
    return percent([joined(text).strip() == FORM.answer(q) for text, q in zip(texts, questions)])


def scratchpad_accuracy(model: nn.Module, tokenizer: TextTokenizer, questions: list[str], longest: int,
                        precision: str | None, name: str = "") -> float:
    """Percent of the questions whose scratchpad, under T_t, ends with the right sum."""
    written = generate(model, tokenizer.encode_all([teacher_prompt(q) for q in questions]), longest,
                       temperature=0, progress=name, precision=precision)
    extract = final_answer(tokenizer)
    found = [(tokens, extract(tokens)) for tokens in written]
    texts = ["" if kept is None else tokenizer.decode(tokens[kept]) for tokens, kept in found]
    return percent([joined(text) == FORM.answer(q) for text, q in zip(texts, questions)])


def rouge_by_task(model: nn.Module, tokenizer: TextTokenizer, tasks: list[NITask], instances: int,
                  longest: int, precision: str | None, name: str = "") -> dict[str, float]:
    """Task → Rouge-L in percent on its first instances; the prompt has its definition and two examples."""
    found = {}
    for task in tasks:
        some, template = task.instances[:instances], instructed(task, SHAPE)
        texts = complete(model, tokenizer, [template(i.input) for i in some], longest, precision,
                         f"{name} {task.name}".strip())
        found[task.name] = percent([rouge_l(text, i.outputs) for text, i in zip(texts, some)])
    return found


def solved(model: nn.Module, tokenizer: TextTokenizer, some: Sequence[Problem], template: Template,
           precision: str | None, name: str = "") -> list[int]:
    """1 for each problem that is solved, else 0: exact match of the number that it comes to."""
    texts = complete(model, tokenizer, [template(p.text) for p in some], LONGEST_SUM, precision, name)
    return [int(result(text) == p.answer) for text, p in zip(texts, some)]


def percent(points: Sequence[float]) -> float:
    return 100 * float(np.mean(points))


# --- eval.py ---


@dataclass
class TransferEval(EvalSettings):
    """How eval.py examines a model that has learnt to add beside its other abilities."""

    data: str | None = option(None, f"folder of Natural-Instructions task files; as in the run, or {DATA}")
    test_instances: int = option(TEST, "of each test task", least=1, most=TEST, unit="instances")
    max_new_tokens: int | None = option(None, f"longest answer; as in the run, or {LONGEST_ANSWER} tokens",
                                        least=1, most=4096)
    max_digits: int | None = option(None, "longest operands; as in the run, or 8", least=2, most=18,
                                    unit="digits")
    questions: int = option(1000, "unseen additions", least=1, most=10**6)
    problem_prompt: str | None = option(None, "of word problems; as the run chose; with --ask, or outside of "
                                        f"runs: {USUAL_PROMPT}", choices=tuple(problem_prompts()))


def prompt_of(run: Path, settings: TransferEval) -> str:
    """The name of the prompt of word problems: as said, or as the run chose it."""
    chosen = run / "problem_prompt.json"
    if settings.problem_prompt or not chosen.exists():
        return settings.problem_prompt or USUAL_PROMPT
    return best_prompt(read_json(chosen, advice="say --problem-prompt"))


def best_prompt(accuracy: dict[str, float]) -> str:
    """The prompt under which the most validation problems are solved."""
    return max(accuracy, key=accuracy.__getitem__)


def ask(model: nn.Module, tokenizer: TextTokenizer, question: str, settings: TransferEval) -> str:
    """`eval.py --ask`: the sum for '12 + 34', or the answer to a word problem."""
    sides = [side.strip() for side in question.split("+")]
    if len(sides) == 2 and all(side.isascii() and side.isdigit() for side in sides):
        prompt = student_prompt(" + ".join(" ".join(side) for side in sides))
    else:
        prompt = problem_prompts()[settings.problem_prompt or USUAL_PROMPT](question)
    tell_unknown_words(tokenizer, prompt)
    longest = settings.max_new_tokens or LONGEST_ANSWER
    return complete(model, tokenizer, [prompt], longest, settings.precision)[0].strip()


def examine(model: nn.Module, tokenizer: TextTokenizer, settings: TransferEval, folder: Path) -> str:
    """`eval.py`: the three measures."""
    shape, tests = prompt_of(folder.parent, settings), problems()["test"]
    tasks = load_split(Path(beside(settings.data or DATA)), "test")
    questions = test_questions(settings.questions, settings.max_digits or 8)
    how = model, tokenizer
    rouge = rouge_by_task(*how, tasks, settings.test_instances, settings.max_new_tokens or LONGEST_ANSWER,
                          settings.precision)
    right = solved(*how, tests, problem_prompts()[shape], settings.precision)
    return (f"direct addition, {len(questions)} unseen questions of up to {settings.max_digits or 8} digits: "
            f"{direct_accuracy(*how, questions, settings.precision):.2f} %\n"
            f"Rouge-L, {len(tasks)} test tasks: {np.mean(list(rouge.values())):.1f}\n"
            f"{len(right)} word problems, prompt {shape}: {percent(right):.1f} %")
