"""Step-by-step addition distilled into direct addition (paper, section 3.3, hypothesis 6, Table 3).

The teacher writes a scratchpad, the student answers at once. Both baselines see only the labelled questions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Iterator

import numpy as np
from torch import nn

from ..distill import Context, practice, practice_chunk
from ..labels import Examples
from ..rounds import RoundSettings
from ..tokenizer import TextTokenizer
from ..training import OPTIMISERS
from .folder import RunFolder, borrow_same
from .item import one_item
from .parts import addition_eval, differs
from .parts.addition_eval import evaluate
from .parts.addition_questions import (FORMS, addition_context, carry_run, digits, draw_questions,
                                       longest_scratchpad, test_questions)
from .report import Record, against_paper, bars, columns, pm, seeds_of, table
from .run import Experiment, Stage, seed_folder
from .settings import DistillSettings, option

ROWS = {"teacher": "teacher, step by step", "before": "student before", "after": "**student after**",
        "scratchpad_then_direct": "scratchpad → direct", "scratchpad_and_direct": "scratchpad + direct",
        "after_hard": "student after, hard labels", "true_answers": "student on as many true answers",
        "token_ratio": "tokens at inference, teacher ÷ student"}
MODELS = {"teacher": "teacher", "before": "teacher", "after": "student",  # row of the table → stage
          **{name: name for name in ("scratchpad_and_direct", "scratchpad_then_direct")}}
MORE_MODELS = {"after_hard": "student_hard", "true_answers": "student_true"}
UNTIL = ("teacher", "practice", "student", "table")
LABELLED = ("model", "precision", "max_digits", "scratchpad", "train_questions", "teacher_lr",
            "teacher_batch", "dropout", "warmup", "decay", "clip", "optimiser",
            "lora_rank")  # of teacher and baselines
PARTS = {"by_digits": digits, "by_carry_run": carry_run}  # what a small table groups the questions by


def scratchpad_examples(questions: list[str], tokenizer: TextTokenizer, form: str) -> Examples:
    return Examples.hard(tokenizer.encode_all([FORMS[form].teacher(q) for q in questions]),
                         tokenizer.encode_answers([FORMS[form].scratchpad(q) for q in questions]))


def direct_examples(questions: list[str], tokenizer: TextTokenizer, form: str) -> Examples:
    return Examples.hard(tokenizer.encode_all([FORMS[form].student(q) for q in questions]),
                         tokenizer.encode_answers([FORMS[form].answer(q) for q in questions]))


@dataclass
class AdditionSettings(DistillSettings):
    """One seed of the experiment. The defaults are the pocket scale; `paper` is nearest to the paper's."""

    max_digits: int = option(8, "longest operands", least=3, most=18, unit="digits")
    scratchpad: str = option("compact", "format: compact, nye (the paper's), or lines: one a column, digits "
                             "without spaces, for tokenizers that split them", choices=FORMS)
    train_questions: int = option(499, "labelled, for teacher and baselines alike", least=1, most=10**6,
                                  unit="questions")
    teacher_epochs: int = option(80, "passes of the teacher over its scratchpads", least=1, most=10**6)
    teacher_lr: float = option(1.5e-3, "learning rate of the teacher and of the baselines", above=0, most=10)
    teacher_batch: int = option(32, "batch size of the teacher and of the baselines", least=1)
    direct_epochs: int = option(50, "passes of the baselines over their data", least=1, most=10**6)
    dropout: float = option(0.1, "of the teacher and of the baselines, whose data are few", least=0, below=1)
    floor: float = option(50.0, "least validation accuracy to go on", least=0, most=100, unit="%", free=True)
    optimiser: str = option("muon", "adamw (the paper's), or muon inside the layers", choices=OPTIMISERS)
    practice_questions: int = option(60_000, "which the teacher answers", least=1, most=10**8,
                                     unit="questions")
    student_epochs: float = option(5.0, "passes of the student over the practice set", least=1e-3, most=1e6)
    student_lr: float = option(2e-3, "learning rate of the student", above=0, most=10)
    student_batch: int = option(128, "batch size of the student", least=1)
    test_questions: int = option(10_000, "unseen, for the table", least=1, most=10**6, unit="questions")
    all_rows: bool = option(False, "also train a student on hard labels and one on true answers", free=True)
    no_baselines: bool = option(False, "only the rows of teacher and student", free=True)
    reuse: str = option("", "run folder to take all finished stages from that would be the same here: for "
                        "another loss on the same kind of labels, all but the student")
    until: str = option("table", "last stage: teacher, practice, student or table", free=True, choices=UNTIL)


def depends_on(s: AdditionSettings) -> dict[str, dict[str, Any]]:
    """Stage → the settings that decide it; the teacher's first, since nothing can be reused without it."""
    labelled, tests = ({name: getattr(s, name) for name in names} for names in (LABELLED, ["test_questions"]))
    direct = labelled | {"direct_epochs": s.direct_epochs}
    models = {"teacher": labelled | {"teacher_epochs": s.teacher_epochs}, "scratchpad_and_direct": direct}
    models["scratchpad_then_direct"] = models["teacher"] | direct
    practised = {**models["teacher"], "practice_questions": s.practice_questions,
                 **asdict(s.practice_settings(1))}
    return {**models, "teacher_validation": models["teacher"], "practice": practised,
            "practice_figures": practised,
            **{f"test_{row}": models[MODELS[row]] | tests for row in MODELS if row != "after"}}


class Addition(Experiment):
    """Table 3."""

    TITLE = "8-digit addition, step by step and at once (Table 3, hypothesis 6)"
    DIFFERS = differs.ADDITION
    Settings, Eval = AdditionSettings, addition_eval.AdditionEval
    ask, examine = staticmethod(addition_eval.ask), staticmethod(addition_eval.examine)
    PAPER = {"teacher": 93, "before": 0, "after": 95,
             "scratchpad_then_direct": 72, "scratchpad_and_direct": 61, "token_ratio": 8.0}
    SCALES = {"pocket": {}, "paper": dict(
        scale="paper", scratchpad="nye", train_questions=499, teacher_epochs=1000, teacher_lr=3e-4,
        teacher_batch=8, direct_epochs=1000, practice_questions=10_000, student_epochs=1.0, student_lr=3e-4,
        student_batch=8, warmup=0.0, decay=0.0, clip=0.0, optimiser="adamw"), "smollm2": dict(
        scale="smollm2", model="data/smollm2", scratchpad="lines", teacher_epochs=12, teacher_lr=3e-4,
        teacher_batch=16, direct_epochs=12, dropout=0.0, practice_questions=10_000, student_epochs=4.0,
        student_lr=5e-4, student_batch=32, optimiser="adamw", save_every=300.0)}
    RECORDS = ("smollm2", "pocket", "paper")
    QUICK = dict(max_digits=3, teacher_epochs=20, teacher_lr=3e-3, dropout=0.0, floor=5.0, direct_epochs=10,
                 practice_questions=10_000, student_epochs=8.0, student_lr=3e-3, student_batch=64,
                 test_questions=500)

    def prepare(self) -> None:
        test_questions(self.settings.test_questions, self.settings.max_digits)  # or there are too few
        if self.reused:
            borrow_same(self.folder, self.reused, self.settings, self.seed, depends_on)

    @property
    def reused(self) -> Path | None:
        """The run folder of this seed to take finished stages from."""
        return seed_folder(Path(self.settings.reuse), self.seed) if self.settings.reuse else None

    @cached_property
    def questions(self) -> dict[str, list[str]]:
        """Labelled questions of the seed: to train on, and to validate the teacher."""
        s, rng = self.settings, np.random.default_rng(self.seed)
        return {split: draw_questions(n, s.max_digits, split, rng)
                for split, n in (("train", s.train_questions), ("validation", 500))}

    @cached_property
    def context(self) -> Context:
        return addition_context(self.tokenizer, self.settings.max_digits, self.settings.scratchpad)

    @cached_property
    def longest(self) -> int:
        return longest_scratchpad(self.tokenizer, self.settings.scratchpad, self.settings.max_digits) + 4

    def distils(self) -> tuple[Context, RoundSettings]:
        s = self.settings
        fit = s.fit_settings(batch_size=max(s.teacher_batch, s.student_batch))
        return self.context, RoundSettings(s.practice_settings(self.longest), fit, s.practice_questions)

    def stages(self) -> Iterator[Stage]:
        """The longest way first: teacher, practice, student. The baselines fill the other cores."""
        until = UNTIL.index(self.settings.until)
        yield Stage("teacher", partial(self.labelled, "teacher"))
        yield Stage("teacher_validation", self.validation, ("teacher",), lambda score: (
            f"teacher: {score['accuracy']:.1f} % of 500 validation questions, step by step"))
        self.check_teacher()
        if until >= UNTIL.index("practice"):
            yield from self.practice_stages()
            yield Stage("practice_figures", self.practice_figures, ("practice",), lambda f: f["shown"])
        if until >= UNTIL.index("student"):
            yield Stage("student", partial(self.student, "student", self.settings.loss), ("practice",))
        if until == UNTIL.index("table"):
            for stage, needs in ("scratchpad_and_direct", ()), ("scratchpad_then_direct", ("teacher",)):
                if stage in self.models:
                    yield Stage(stage, partial(self.labelled, stage), needs)
            for stage in MORE_MODELS.values() if self.settings.all_rows else ():
                yield Stage(stage, partial(self.student, stage, "hard"), ("practice",))
            for row, model in self.models.items():
                yield Stage(f"test_{row}", partial(self.test, row), (model,))

    def practice_stages(self) -> Iterator[Stage]:
        """The teacher's answers to fresh questions, with soft labels: chunk by chunk, then joined."""
        n, settings = self.settings.practice_questions, self.settings.practice_settings(self.longest)
        get, how, names = self.folder.get, (self.tokenizer, self.context, n), []
        for i in range(0 if self.folder.file("practice") else -(-n // settings.chunk)):
            names.append(f"practice.parts/chunk-{i:04d}")
            yield Stage(names[-1], lambda i=i: practice_chunk(
                get("teacher"), *how, i, settings, seed=self.seed), ("teacher_validation",))
        yield Stage("practice", lambda: practice(get("teacher"), *how, settings, seed=self.seed,
                                                 folder=self.folder.path / "practice.parts"), tuple(names))

    @property
    def models(self) -> dict[str, str]:
        s = self.settings
        few = {row: model for row, model in MODELS.items() if model in ("teacher", "student")}
        return (few if s.no_baselines else MODELS) | (MORE_MODELS if s.all_rows else {})

    def labelled(self, stage: str) -> nn.Module:
        """Train on the labelled questions: on scratchpads, then on direct answers, or on both at once."""
        s, questions = self.settings, self.questions["train"]
        scratchpads = scratchpad_examples(questions, self.tokenizer, s.scratchpad)
        direct = direct_examples(questions, self.tokenizer, s.scratchpad)
        start = self.folder.get("teacher") if stage == "scratchpad_then_direct" else self.base
        examples = {"teacher": scratchpads, "scratchpad_then_direct": direct,
                    "scratchpad_and_direct": Examples.join([scratchpads, direct])}[stage]
        settings = s.fit_settings(lr=s.teacher_lr, batch_size=s.teacher_batch, loss="hard")
        epochs = s.teacher_epochs if stage == "teacher" else s.direct_epochs
        return self.fit_copy(start, examples, settings, epochs, stage)

    def validation(self) -> dict[str, Any]:
        return evaluate(self.folder.get("teacher"), self.tokenizer, self.questions["validation"], True,
                        self.longest, "check teacher", self.settings.precision, self.settings.scratchpad)

    def check_teacher(self) -> None:
        """Raises ValueError for a teacher that is not worth distilling."""
        known, floor = self.folder.file("teacher_validation"), self.settings.floor
        if known and (accuracy := self.folder.get("teacher_validation")["accuracy"]) < floor:
            raise ValueError(f"the teacher solves {accuracy:.1f} % of the validation questions, below the "
                             f"floor of {floor} %: train it longer (--teacher-epochs), or lower --floor")

    def practice_figures(self) -> dict[str, Any]:
        """Percent of the practice questions without an answer, and of the teacher's answers that are true."""
        items, asked = self.folder.get("practice"), self.settings.practice_questions
        truth, settings = self.true_answers(items).answers, self.settings.practice_settings(self.longest)
        true = 100 * sum(items.answers[i] == truth[i] for i in range(len(items))) / len(items)
        dropped = 100 * (asked - len(items)) / asked
        item = one_item(self.context, self.tokenizer, self.folder.get("teacher"), settings, self.seed)
        return {"practice_dropped": dropped, "practice_true": true, "shown": (
            f"{item}\npractice set: {len(items)} questions, {dropped:.2f} % dropped without an answer, "
            f"{true:.2f} % of the answers true\n")}

    def true_answers(self, items: Examples) -> Examples:
        """The same questions with true answers in place of the teacher's."""
        form, known = self.settings.scratchpad, items.inputs is not None  # old practice sets lack them
        prefix = len(FORMS[form].student(""))
        questions = [items.input(i) if known else self.tokenizer.decode(items.prompts[i])[prefix:]
                     for i in range(len(items))]
        return direct_examples(questions, self.tokenizer, form)

    def student(self, stage: str, loss: str) -> nn.Module:
        """The teacher's own weights, fine-tuned to answer at once."""
        s, items = self.settings, self.folder.get("practice")
        items = self.true_answers(items) if stage == "student_true" else items
        settings = s.fit_settings(lr=s.student_lr, batch_size=s.student_batch, loss=loss, dropout=0.0)
        return self.fit_copy(self.folder.get("teacher"), items, settings, s.student_epochs, stage)

    def test(self, row: str) -> dict[str, Any]:
        """A row of the table, on the unseen questions that all rows have."""
        questions = test_questions(self.settings.test_questions, self.settings.max_digits)
        longest = self.longest if row == "teacher" else 2 * self.settings.max_digits + 4
        return evaluate(self.folder.get(self.models[row]), self.tokenizer, questions, row == "teacher",
                        longest, f"test {row}", self.settings.precision, self.settings.scratchpad)

    def figures(self) -> dict[str, Any] | None:
        if self.settings.until != "table":
            return None
        scores = {row: self.folder.get(f"test_{row}") for row in ROWS if row in self.models}
        metrics = {row: scores[row]["accuracy"] for row in self.models}
        metrics["token_ratio"] = scores["teacher"]["tokens"] / scores["after"]["tokens"]
        if self.reused and RunFolder(self.reused, self.device).file("test_after"):
            metrics["reused"] = RunFolder(self.reused, self.device).get("test_after")["accuracy"]
        practised = self.folder.get("practice_figures")
        metrics |= {name: practised[name] for name in ("practice_true", "practice_dropped")}
        return {"metrics": metrics} | {part: {row: s[part] for row, s in scores.items()} for part in PARTS}

    @classmethod
    def table(cls, record: Record) -> str:
        """Table 3 beside the paper's, then accuracy by digits and by carry run."""
        true, dropped = (pm(record["metrics"][f"practice_{name}"]) for name in ("true", "dropped"))
        settings, parts = record["settings"], []
        titles = ROWS | {"reused": f"student after, {settings.get('reuse')}"}
        for part, of in PARTS.items():
            keys = list(record[part]["teacher"])
            tested = test_questions(settings["test_questions"], settings["max_digits"])
            counts = Counter(str(of(question)) for question in tested)
            rows = [["test questions", *(counts[key] for key in keys)]]
            rows += [[ROWS[row], *(f"{own[key]:.1f}" for key in keys)] for row, own in record[part].items()]
            parts.append(table([part.replace("_", " "), *keys], rows))
        return "\n\n".join([
            f"Exact match on unseen additions of up to {settings['max_digits']} digits, %, "
            f"{seeds_of(record)}", against_paper(record, titles),
            f"Of the teacher's practice answers {true} % are true; {dropped} % of the questions were "
            "dropped, since no answer could be extracted.", *parts])

    @classmethod
    def plot(cls, record: Record, path: Path) -> bool:
        """Table 3 as a picture."""
        rows = [row for row in MODELS if row in record["metrics"]]
        figures = {f"minicd, {record['scale']} scale": [record["metrics"][row]["mean"] for row in rows],
                   "paper": [record["paper"][row] for row in rows]}
        return bars(figures, [ROWS[row].strip("*") for row in rows], path, cls.TITLE, "exact match, %")

    @classmethod
    def front(cls, records: list[Record]) -> str:
        """README shows Table 3 itself."""
        return columns(records, ROWS)
