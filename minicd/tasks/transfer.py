"""Does what additions teach reach other tasks, and is anything forgotten (hypothesis 7; paper, 3.3, B.6)?

T_t is a description of addition with two scratchpads, T_s the same description with two direct answers. The
teacher is tuned on 499 scratchpads and on items of Natural Instructions. Its practice answers are mixed with
more such items for the student; a second student goes without them. Measured on each model: direct addition,
Rouge-L on other tasks' instructions, and sums inside word problems, which nobody has practised.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Iterator

import numpy as np
from torch import nn
from tqdm import tqdm

from ..distill import Context, identity, practice
from ..labels import Examples, Ragged
from ..metrics import mcnemar
from ..rounds import RoundSettings
from ..tokenizer import TextTokenizer
from .item import one_item
from .parts import differs, transfer_eval as measure
from .parts.addition_questions import draw_questions, final_answer, longest_scratchpad, test_questions
from .parts.instruction_eval import TEST, bare
from .parts.instruction_items import draw_items, load_split, with_true_answers
from .parts.natural_instructions import NITask
from .parts.transfer_eval import DATA, EXAMPLES, FORM, TransferEval, best_prompt, problem_prompts
from .parts.word_problems import COUNTS, Resembling, asked_sums, problems
from .folder import borrow_same
from .report import Record, pm, seeds_of, table
from .run import Experiment, Stage, seed_folder
from .settings import DistillSettings, beside, option

MEASURES = {"addition": "direct addition, exact match, %", "rouge": "Natural Instructions, Rouge-L",
            "problems": "word problems, exact match, %"}
COLUMNS = {"base": "as it came", "before": "student before", "after": "**student after**",
           "alone": "student after, without instruction items"}
TAUGHT = ("model", "precision", "data", "max_digits", "train_questions", "teacher_items", "teacher_epochs",
          "teacher_lr", "teacher_batch", "item_tokens", "warmup", "decay", "clip", "optimiser")
CHUNK = 500  # practice questions at a time: so many are on disk when a run is interrupted


@dataclass
class TransferSettings(DistillSettings):
    """One seed of the experiment."""

    scale: str = option("smollm2", "smollm2: there is no smaller model that understands word problems")
    model: str = option("data/smollm2", "folder or hub id of the model to start from")
    data: str = option(DATA, "folder of Natural-Instructions task files, the pocket's or the real ones")
    max_digits: int = option(8, "longest operands", least=2, most=18, unit="digits")
    train_questions: int = option(499, "with scratchpads, for the teacher", least=1, most=10**6,
                                  unit="questions")
    teacher_items: int = option(2000, "instruction items, each seen once by the teacher", least=1,
                                unit="items")
    teacher_epochs: int = option(12, "passes of the teacher over its scratchpads", least=1, most=10**6)
    teacher_lr: float = option(3e-4, "learning rate of the teacher", above=0, most=10)
    teacher_batch: int = option(16, "batch size of the teacher", least=1)
    floor: float = option(50.0, "least validation accuracy to go on", least=0, most=100, unit="%", free=True)
    start: str = option("base", "what the student starts from: as in the paper the base, or the teacher",
                        choices=("base", "teacher"))
    practice_questions: int = option(10_000, "which the teacher answers", least=1, most=10**8,
                                     unit="questions")
    student_items: int = option(4000, "instruction items among the student's", least=1, unit="items")
    item_answers: str = option("own", "what the student learns on these: its own answers before, which "
                               "hold it where it is, or as in the paper the true ones",
                               choices=("own", "true"))
    student_stop: str = option("line", "what ends the student's sums: the line, as in its prompt, or the "
                               "model's stop token", choices=("line", "token"))
    student_epochs: float = option(1.0, "passes of the student over both", least=1e-3, most=1e6)
    student_lr: float = option(2e-3, "learning rate of the student", above=0, most=10)
    lora_rank: int = option(32, "of the student's adapters, with which it forgets less; 0: all its weights "
                            "are trained, as the teacher's always are", least=0, most=4096)
    student_batch: int = option(32, "batch size of the student", least=1)
    item_tokens: int = option(256, "longest instruction item, with its answer", least=1, unit="tokens")
    max_new_tokens: int = option(64, "longest answer to an instruction", least=1, most=4096, unit="tokens")
    test_questions: int = option(1000, "unseen additions", least=1, most=10**6, unit="questions")
    test_instances: int = option(TEST, "of each test task", least=1, most=TEST, unit="instances")
    test_tasks: int | None = option(None, "only so many test tasks, the first by name; all unless told "
                                    "otherwise", least=1, unit="tasks")
    test_problems: int = option(COUNTS["test"], "word problems to test; at most as many others choose "
                                "their prompt", least=1, most=COUNTS["test"], unit="problems")
    reuse: str = option("", "run folder to take teacher, practice and items from, where they would be the "
                        "same here", free=True)
    save_every: float = option(300.0, "between checkpoints, from which an interrupted run goes on", least=0,
                               unit="seconds", free=True)


def depends_on(s: TransferSettings) -> dict[str, dict[str, Any]]:
    """Stage → the settings that decide it; the teacher's first, since nothing can be reused without it."""
    taught = {name: getattr(s, name) for name in TAUGHT}
    tested = taught | {"test_questions": s.test_questions}
    practised = taught | {"practice_questions": s.practice_questions, **asdict(s.practice_settings(1))}
    asked = {name: getattr(s, name) for name in ("start", "student_items", "item_answers")}
    items = taught | asked | asdict(s.practice_settings(s.max_new_tokens))
    return {"teacher": taught, "teacher_validation": tested, "scratchpad": tested, "practice": practised,
            "items": items}


class Transfer(Experiment):
    """Three measures of three models, or of four where the student starts from the teacher."""

    TITLE = "Distilled addition, in other tasks (hypothesis 7)"
    DIFFERS = differs.TRANSFER
    Settings, Eval = TransferSettings, TransferEval
    ask, examine = staticmethod(measure.ask), staticmethod(measure.examine)
    SCALES = {"smollm2": {}}
    RECORDS = ("smollm2",)
    QUICK = dict(max_digits=2, train_questions=64, teacher_items=16, teacher_epochs=2, teacher_batch=8,
                 floor=0.0, practice_questions=64, student_items=16, student_epochs=1.0, student_batch=8,
                 item_tokens=128, max_new_tokens=16, test_questions=16, test_instances=2, test_tasks=3,
                 test_problems=20)
    PAPER = {"addition_before": 1, "addition_after": 17, "rouge_before": 57, "rouge_after": 58,
             "problems_before": 17, "problems_after": 30, "scratchpad": 97}

    def prepare(self) -> None:
        """What is wrong with tasks or tokenizer is said before anything is trained."""
        both = {task.name for task in self.train_tasks} & {task.name for task in self.test_tasks}
        if both:
            raise ValueError(f"--data {self.settings.data}: {min(both)} is a task for training and for tests")
        if self.settings.student_stop == "line":
            end_of_line(self.tokenizer)
        if self.settings.reuse:
            other = seed_folder(Path(self.settings.reuse), self.seed)
            borrow_same(self.folder, other, self.settings, self.seed, depends_on)
        if self.settings.data == DATA:
            tqdm.write(f"The instructions are those of the pocket world, {DATA}; for the real ones, name the "
                       "folder tasks of Natural Instructions with --data")

    def files(self) -> list[Path]:
        folders, data = {"train": self.train_tasks, "test": self.test_tasks}, Path(beside(self.settings.data))
        return [(data / split if (data / split).is_dir() else data) / f"{task.name}.json"
                for split, tasks in folders.items() for task in tasks]

    @cached_property
    def train_tasks(self) -> list[NITask]:
        return load_split(Path(beside(self.settings.data)), "train")

    @cached_property
    def test_tasks(self) -> list[NITask]:
        return load_split(Path(beside(self.settings.data)), "test")[: self.settings.test_tasks]

    @property
    def rows(self) -> dict[str, str]:
        """Column of the table → the model it is about."""
        base = {"base": "base"} if self.settings.start != "base" else {}
        return base | {"before": self.settings.start, "after": "student", "alone": "student_alone"}

    def model(self, name: str) -> nn.Module:
        return self.base if name == "base" else self.folder.get(name)

    # --- what is trained on ---

    def questions(self, n: int, split: str, rng: np.random.Generator, unique: bool = False) -> list[str]:
        """n questions of a split, without the sums of the word problems and the examples of the prompts."""
        left_out, found = asked_sums() | set(EXAMPLES), []
        while len(found) < n:
            drawn = draw_questions(n, self.settings.max_digits, split, rng, unique)
            found += [q for q in drawn if q not in left_out]
            found = list(dict.fromkeys(found)) if unique else found
        return found[:n]

    @cached_property
    def context(self) -> Context:
        return Context(lambda n, rng: self.questions(n, "practice", rng), measure.teacher_prompt,
                       measure.student_prompt, final_answer(self.tokenizer))

    @cached_property
    def longest(self) -> int:
        return longest_scratchpad(self.tokenizer, "lines", self.settings.max_digits) + 4

    def items(self, n: int, number: int) -> list[tuple[str, str]]:
        """Instruction items: prompts and true answers; `number` tells the teacher's from the student's."""
        rng = np.random.default_rng((self.seed, 11, number))
        return draw_items(self.train_tasks, n, self.tokenizer, self.settings.item_tokens, Resembling(), rng)

    def scratchpads(self) -> Examples:
        s = self.settings
        questions = self.questions(s.train_questions, "train", np.random.default_rng(self.seed), unique=True)
        return Examples.hard(self.tokenizer.encode_all(list(map(measure.teacher_prompt, questions))),
                             self.tokenizer.encode_answers(list(map(FORM.scratchpad, questions))))

    # --- the stages ---

    def stages(self) -> Iterator[Stage]:
        yield Stage("teacher", self.teacher)
        yield Stage("teacher_validation", self.validation, ("teacher",), lambda accuracy: (
            f"teacher: {accuracy:.1f} % of the validation questions, step by step"))
        self.check_teacher()
        yield Stage("practice", self.practise, ("teacher_validation",))
        yield Stage("items", self.student_items, ("teacher_validation",))
        yield Stage("practice_figures", self.practice_figures, ("practice", "items"), lambda f: f["shown"])
        yield Stage("student", partial(self.student, "student"), ("practice", "items"))
        yield Stage("student_alone", partial(self.student, "student_alone"), ("practice",))
        yield Stage("problem_prompt", self.choose_prompt, self.needs(self.settings.start), lambda accuracy: (
            f"word problems are asked under the prompt {best_prompt(accuracy)}: {accuracy}"))
        yield Stage("scratchpad", partial(self.step_by_step, "test"), ("teacher_validation",))
        for row, name in self.rows.items():
            yield Stage(f"addition-{row}", partial(self.addition, name), self.needs(name))
            yield Stage(f"rouge-{row}", partial(self.rouge, name), self.needs(name))
            yield Stage(f"problems-{row}", partial(self.word_problems, name),
                        (*self.needs(name), "problem_prompt"))

    @staticmethod
    def needs(model: str) -> tuple[str, ...]:
        return () if model == "base" else (model,)

    def distils(self) -> tuple[Context, RoundSettings]:
        s = self.settings
        fit = s.fit_settings(batch_size=max(s.teacher_batch, s.student_batch), lora_rank=0)
        practice = replace(s.practice_settings(self.longest), chunk=CHUNK)
        return self.context, RoundSettings(practice, fit, s.practice_questions)

    def teacher(self) -> nn.Module:
        """The base, tuned on every scratchpad `teacher_epochs` times and on every instruction item once."""
        s = self.settings
        items = with_true_answers(self.items(s.teacher_items, 0), self.tokenizer)
        examples = Examples.join([self.scratchpads()] * s.teacher_epochs + [items])
        settings = s.fit_settings(lr=s.teacher_lr, batch_size=s.teacher_batch, loss="hard", lora_rank=0)
        return self.fit_copy(self.base, examples, settings, 1.0, "teacher")

    def validation(self) -> float:
        return self.step_by_step("validation")

    def step_by_step(self, split: str) -> float:
        """Percent of the test questions, or of 200 of validation at most, that it solves under T_t."""
        s, rng = self.settings, np.random.default_rng((self.seed, 12))
        questions = (test_questions(s.test_questions, s.max_digits) if split == "test" else
                     self.questions(min(200, s.test_questions), split, rng))
        return measure.scratchpad_accuracy(self.folder.get("teacher"), self.tokenizer, questions,
                                           self.longest, s.precision, f"{split} of the teacher")

    def check_teacher(self) -> None:
        """Raises ValueError for a teacher that is not worth distilling."""
        known, floor = self.folder.file("teacher_validation"), self.settings.floor
        if known and (accuracy := self.folder.get("teacher_validation")) < floor:
            raise ValueError(f"the teacher solves {accuracy:.1f} % of the validation questions, below the "
                             f"floor of {floor} %: train it longer (--teacher-epochs), or lower --floor")

    def practise(self) -> Examples:
        s = self.settings
        settings = replace(s.practice_settings(self.longest), chunk=CHUNK)
        return practice(self.folder.get("teacher"), self.tokenizer, self.context, s.practice_questions,
                        settings, seed=self.seed, folder=self.folder.path / "practice.parts")

    def student_items(self) -> Examples:
        """The instruction items among the student's: T_t and T_s are the same where its start answers them.

        Where there are fewer than are wanted, they come again; it answers each time anew.
        """
        s, different = self.settings, self.items(self.settings.student_items, 1)
        items = [different[i % len(different)] for i in range(s.student_items)]
        if s.item_answers == "true":
            return with_true_answers(items, self.tokenizer)
        context = Context(lambda n, rng: [asked for asked, _ in items], bare, bare, identity)
        settings = replace(s.practice_settings(s.max_new_tokens), chunk=len(items))
        return practice(self.model(s.start), self.tokenizer, context, len(items), settings, seed=self.seed,
                        name="instruction items")

    def practice_figures(self) -> dict[str, Any]:
        """How much the student practises, and percent of the teacher's answers that are true."""
        practised, s = self.folder.get("practice"), self.settings
        true = measure.percent([self.tokenizer.decode(practised.answers[i]) == FORM.answer(practised.input(i))
                                for i in range(len(practised))])
        items = len(self.folder.get("items"))
        item = one_item(self.context, self.tokenizer, self.folder.get("teacher"),
                        s.practice_settings(self.longest), self.seed)
        return {"practised": len(practised), "practice_true": true, "items": items, "shown": (
            f"{item}\npractice set: {len(practised)} of {s.practice_questions} questions have an answer, "
            f"{true:.2f} % of the answers are true; {items} instruction items beside them\n")}

    def longest_other(self) -> int:
        return self.settings.item_tokens

    def student(self, stage: str) -> nn.Module:
        """Fitted to the practice set, with instruction items among it, or alone."""
        s, examples = self.settings, self.folder.get("practice")
        if s.student_stop == "line":
            examples = ending_lines(examples, self.tokenizer)
        if stage == "student":
            examples = Examples.join([examples, self.folder.get("items")])
        settings = s.fit_settings(lr=s.student_lr, batch_size=s.student_batch)
        return self.fit_copy(self.model(s.start), examples, settings, s.student_epochs, stage)

    def choose_prompt(self) -> dict[str, float]:
        """Prompt → percent of the validation problems that the student before solves under it."""
        unseen = problems()["validation"][measure.SHOWN :][: self.settings.test_problems]
        model = self.model(self.settings.start)
        return {name: measure.percent(measure.solved(model, self.tokenizer, unseen, template,
                                                     self.settings.precision, f"prompt {name}"))
                for name, template in problem_prompts().items()}

    # --- the measures ---

    def addition(self, name: str) -> float:
        questions = test_questions(self.settings.test_questions, self.settings.max_digits)
        return measure.direct_accuracy(self.model(name), self.tokenizer, questions, self.settings.precision,
                                       f"addition {name}")

    def rouge(self, name: str) -> dict[str, float]:
        s = self.settings
        return measure.rouge_by_task(self.model(name), self.tokenizer, self.test_tasks, s.test_instances,
                                     s.max_new_tokens, s.precision, f"{name} on")

    def word_problems(self, name: str) -> list[int]:
        template = problem_prompts()[best_prompt(self.folder.get("problem_prompt"))]
        some = problems()["test"][: self.settings.test_problems]
        return measure.solved(self.model(name), self.tokenizer, some, template, self.settings.precision,
                              f"problems {name}")

    def figures(self) -> dict[str, Any]:
        found = {f"{name}-{row}": self.folder.get(f"{name}-{row}") for name in MEASURES for row in self.rows}
        by_task = {row: found[f"rouge-{row}"] for row in self.rows}
        right = {row: found[f"problems-{row}"] for row in self.rows}
        practised = self.folder.get("practice_figures")
        metrics = {f"addition_{row}": found[f"addition-{row}"] for row in self.rows}
        metrics |= {f"rouge_{row}": float(np.mean(list(tasks.values()))) for row, tasks in by_task.items()}
        metrics |= {f"problems_{row}": measure.percent(points) for row, points in right.items()}
        metrics |= {"scratchpad": self.folder.get("scratchpad")}
        metrics |= {name: practised[name] for name in ("practice_true", "practised", "items")}
        return {"metrics": metrics, "by_task": by_task, "right": right,
                "prompts": self.folder.get("problem_prompt")}

    @classmethod
    def complete(cls, record: Record) -> Record:
        """The p-value of McNemar's test on the word problems; of several seeds, on each problem's mean."""
        right = record["right"]
        p = {row: mcnemar(right["before"], right[row]) for row in ("after", "alone")}
        return {**record, "p_value": p}

    # --- how it is shown ---

    @classmethod
    def table(cls, record: Record) -> str:
        """The three measures beside the paper's, then Rouge-L task by task."""
        metrics, paper = record["metrics"], record["paper"]
        rows = [row for row in COLUMNS if row in record["by_task"]]
        means = [[title, *(pm(metrics[f"{name}_{row}"]) for row in rows),
                  *(paper[f"{name}_{row}"] for row in ("before", "after"))]
                 for name, title in MEASURES.items()]
        each = [[task, *(f"{record['by_task'][row][task]:.1f}" for row in rows)]
                for task in record["by_task"]["before"]]
        asked = ", ".join(f"{name} {accuracy:.1f}" for name, accuracy in record["prompts"].items())
        p = {row: f"{value:.2g}" for row, value in record["p_value"].items()}
        return "\n\n".join([
            f"{seeds_of(record)}; the student starts from the {record['settings']['start']}",
            table(["", *(COLUMNS[row] for row in rows), "paper, before", "paper, after"], means),
            f"Step by step the teacher solves {pm(metrics['scratchpad'])} % (paper: {paper['scratchpad']}); "
            f"of its {pm(metrics['practised'], 0)} practice answers {pm(metrics['practice_true'])} % are "
            f"true, and {pm(metrics['items'], 0)} instruction items stand beside them. On "
            f"{len(record['right']['after'])} word problems the change has p = {p['after']}, without "
            f"instruction items p = {p['alone']} (McNemar's exact test). Their prompt was chosen on other "
            f"problems, where the student before solved, in %: {asked}.",
            table(["Rouge-L", *(COLUMNS[row].strip("*") for row in rows)], each)])

    @classmethod
    def headline(cls, record: Record) -> str:
        """Each measure from before to after."""
        found = record["metrics"]
        addition, rouge, solved = (" → ".join(pm(found[f"{name}_{row}"]) for row in ("before", "after"))
                                   for name in MEASURES)
        return (f"direct addition {addition} % (paper: 1 → 17), Rouge-L {rouge} (57 → 58), "
                f"word problems {solved} % (17 → 30), p = {record['p_value']['after']:.2g}")


def ending_lines(examples: Examples, tokenizer: TextTokenizer) -> Examples:
    """The same answers and labels with the end of a line for the stop token: so end those in T_s.

    A student that learns to write the stop token after its sums soon writes it in the midst of other answers.
    In labels of probabilities the two change places, so that none stands there twice.
    """
    line, eos = end_of_line(tokenizer), tokenizer.eos_id

    def ended(ids: Ragged, swap: bool = False) -> Ragged:
        values = ids.values.masked_fill(ids.values == eos, line)
        return replace(ids, values=values.masked_fill(ids.values == line, eos) if swap else values)

    soft = examples.labels
    labels = replace(soft, ids=ended(soft.ids, swap=soft.weights.is_floating_point()))
    return replace(examples, answers=ended(examples.answers), labels=labels)


def end_of_line(tokenizer: TextTokenizer) -> int:
    """Raises ValueError where no token is the end of a line and nothing else."""
    *_, last = (i for i in tokenizer.encode_answer("1\n") if i != tokenizer.eos_id)
    if tokenizer.decode([last]) != "\n":
        raise ValueError("the model's tokenizer has no token for the end of a line: say --student-stop token")
    return last
