"""Step-by-step addition distilled into direct addition (paper, section 3.3, hypothesis 6, Table 3).

The teacher is asked to add step by step and writes a scratchpad; the student is asked to add and must answer at once.
Both baselines see the same labelled questions as the teacher and no practice questions.
"""

from __future__ import annotations

import shutil
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..hf.checkpoint import load
from ..distill import Context, distill, practice
from .experiment import RunFolder, option, record, seed_folder, seed_folders, write_record
from ..labels import Examples, SoftLabels
from ..rounds import check_on_policy
from ..metrics import exact_match
from .report import addition_table, minutes_line
from ..sampling import generate
from ..tokenizer import TextTokenizer
from ..training import Epochs, FitSettings, fit
from .addition_questions import (SCRATCHPADS, addition_context, answer, carry_run, draw_questions, final_answer,
                                 longest_scratchpad, split_of, student_template, teacher_template, test_questions)
from .loss_options import LossOptions

PAPER = {"teacher": 93, "before": 0, "after": 95, "scratchpad_then_direct": 72, "scratchpad_and_direct": 61, "token_ratio": 8.0}
LONGEST = 256  # tokens of a completion for eval.py, unless told otherwise


def scratchpad_examples(questions: list[str], tokenizer: TextTokenizer, style: str) -> Examples:
    return Examples.hard(tokenizer.encode_all([teacher_template(q) for q in questions]),
                         tokenizer.encode_answers([SCRATCHPADS[style](q) for q in questions]))


def direct_examples(questions: list[str], tokenizer: TextTokenizer) -> Examples:
    return Examples.hard(tokenizer.encode_all([student_template(q) for q in questions]),
                         tokenizer.encode_answers([answer(q) for q in questions]))


@dataclass
class Score:
    """How a model did on a list of questions."""

    accuracy: float  # percent, exact match
    tokens: float  # mean number of prompt and completion tokens a question
    by_digits: dict[str, float] = field(default_factory=dict)  # percent
    by_carry_run: dict[str, float] = field(default_factory=dict)  # percent


def evaluate(model: nn.Module, tokenizer: TextTokenizer, questions: list[str], step_by_step: bool, max_new_tokens: int,
             progress: str = "evaluate") -> Score:
    """Greedy answers to the questions, with or without the scratchpad, compared exactly."""
    template = teacher_template if step_by_step else student_template
    prompts = tokenizer.encode_all([template(q) for q in questions])
    completions = generate(model, prompts, max_new_tokens, temperature=0, progress=progress, precision="auto")
    extract = final_answer(tokenizer) if step_by_step else lambda tokens: slice(0, len(tokens))
    right = np.zeros(len(questions))
    for i, (question, tokens) in enumerate(zip(questions, completions)):
        found = extract(tokens)
        text = tokenizer.decode(tokens[found]) if found else ""
        right[i] = exact_match("".join(text.split()), answer(question).replace(" ", ""))
    tokens_used = np.mean([len(p) + len(c) + 1 for p, c in zip(prompts, completions)])
    return Score(100 * right.mean(), float(tokens_used), grouped(right, [len(q.split("+")[0].split()) for q in questions]),
                 grouped(right, [carry_run(q) for q in questions]))


def grouped(right: np.ndarray, keys: list[int]) -> dict[str, float]:
    """Percent right for each key."""
    return {str(k): round(100 * float(right[np.array(keys) == k].mean()), 2) for k in sorted(set(keys))}


@dataclass
class AdditionSettings(LossOptions):
    """One seed of the experiment. The defaults are the pocket scale; PAPER_SCALE is the paper's own recipe."""

    model: str = option("data/pocket", "folder or hub id of the T5 to start from")
    scale: str = option("pocket", "pocket, or paper: the paper's own recipe (give it a real T5 with --model)")
    max_digits: int = option(8, "operands have 1 to this many digits")
    scratchpad: str = option("compact", "scratchpad format: compact, or nye (the paper's)", choices=SCRATCHPADS)
    train_questions: int = option(499, "labelled questions, the same for the teacher and both baselines")
    teacher_epochs: int = option(80, "passes of the teacher over its scratchpads")
    teacher_lr: float = option(1.5e-3, "learning rate of the teacher and of the baselines")
    teacher_batch: int = option(32, "batch size of the teacher and of the baselines")
    direct_epochs: int = option(100, "passes of the baselines over their data")
    dropout: float = option(0.1, "dropout of the teacher and of the baselines, whose data are few")
    floor: float = option(50.0, "stop where the teacher solves fewer validation questions than this (percent)", free=True)
    practice_questions: int = option(60_000, "unlabelled questions that the teacher answers")
    student_epochs: float = option(5.0, "passes of the student over the practice set")
    student_lr: float = option(2e-3, "learning rate of the student")
    student_batch: int = option(128, "batch size of the student")
    warmup: float = option(0.02, "share of the steps with a growing learning rate")
    decay: float = option(0.3, "share of the steps, at the end, with a falling learning rate")
    clip: float = option(1.0, "largest gradient norm; 0: no clipping")
    optimiser: str = option("muon", "adamw (the paper's), or muon for the matrices inside the layers", choices=("adamw", "muon"))
    test_questions: int = option(10_000, "unseen questions for the table")
    all_rows: bool = option(False, "also train a student on hard labels and one on as many true answers", free=True)
    reuse: str = option("", "take teacher and practice set from this finished run folder, to try another loss on them")
    until: str = option("table", "stop after this stage: teacher, practice, student or table", free=True,
                        choices=("teacher", "practice", "student", "table"))
    save_every: float = option(30.0, "seconds between checkpoints, from which an interrupted run goes on", free=True)


PAPER_SCALE = dict(scale="paper", scratchpad="nye", train_questions=499, teacher_epochs=1000, teacher_lr=3e-4, teacher_batch=8,
                   direct_epochs=1000, practice_questions=10_000, student_epochs=1, student_lr=3e-4, student_batch=8,
                   warmup=0.0, decay=0.0, clip=0.0, optimiser="adamw")
QUICK = dict(max_digits=3, teacher_epochs=20, teacher_lr=3e-3, dropout=0.0, direct_epochs=10, practice_questions=3000,
             student_epochs=10.0, student_batch=64, test_questions=500, floor=5.0)


class AdditionRun:
    """The stages of the experiment for one seed; each is a method, and each is skipped where the folder already has it."""

    def __init__(self, settings: AdditionSettings, seed: int, folder: RunFolder, device: torch.device):
        self.settings, self.seed, self.folder, self.device = settings, seed, folder, device
        self.base, self.tokenizer = load(settings.model, device)
        rng = np.random.default_rng(seed)
        self.train = draw_questions(settings.train_questions, settings.max_digits, "train", rng)
        self.validation = draw_questions(500, settings.max_digits, "validation", rng)
        self.context = addition_context(self.tokenizer, settings.max_digits)
        if settings.on_policy:
            check_on_policy(self.context)
        if settings.reuse:
            self.folder.borrow(seed_folder(Path(settings.reuse), seed), ["teacher", "practice.safetensors"])
        self.max_scratchpad = longest_scratchpad(self.tokenizer, settings.scratchpad, settings.max_digits) + 4

    def fit_settings(self, kind: str, loss: str = "hard") -> FitSettings:
        s = self.settings
        lr, batch, dropout = ((s.student_lr, s.student_batch, 0.0) if kind == "student" else
                              (s.teacher_lr, s.teacher_batch, s.dropout))
        return FitSettings(lr=lr, batch_size=batch, warmup=s.warmup, decay=s.decay, clip=s.clip, loss=loss,
                           jsd_beta=s.jsd_beta, dropout=dropout, optimiser=s.optimiser)

    def teacher(self) -> nn.Module:
        """The base model, fine-tuned on the labelled scratchpads."""
        def make(progress: Path) -> nn.Module:
            return self.supervised(self.base, scratchpad_examples(self.train, self.tokenizer, self.settings.scratchpad),
                                   self.settings.teacher_epochs, "teacher", progress)
        return self.folder.model("teacher", make, self.tokenizer, self.device)

    def supervised(self, start: nn.Module, examples: Examples, epochs: float, name: str, progress: Path) -> nn.Module:
        model, settings = deepcopy(start), self.fit_settings("teacher")
        batches = Epochs(examples, settings.batch_size, epochs, self.seed, model.config.pad_token_id)
        history = fit(model, batches, settings, seed=self.seed, name=name, checkpoint=progress,
                      save_every=self.settings.save_every)
        self.folder.note("losses", name, history)
        return model

    def check_teacher(self, teacher: nn.Module) -> None:
        """Raises ValueError for a teacher that is not worth distilling."""
        def make() -> dict:
            return asdict(evaluate(teacher, self.tokenizer, self.validation, True, self.max_scratchpad, "check teacher"))
        accuracy = self.folder.value("teacher_validation", make)["accuracy"]
        print(f"teacher: {accuracy:.1f} % of {len(self.validation)} validation questions, step by step")
        if accuracy < self.settings.floor:
            raise ValueError(f"the teacher solves {accuracy:.1f} % of the validation questions, below the floor of "
                             f"{self.settings.floor} %: train it longer (--teacher-epochs), or lower --floor")

    def practice(self, teacher: nn.Module) -> Examples:
        """The teacher's answers to fresh questions, with soft labels."""
        path, parts = self.folder.path / "practice.safetensors", self.folder.path / "practice.parts"
        if not path.exists():
            settings = self.settings.practice_settings(self.max_scratchpad)
            with self.folder.timed("practice"):
                items = practice(teacher, self.tokenizer, self.context, self.settings.practice_questions, settings,
                                 seed=self.seed, folder=parts)
                items.save(path)
        shutil.rmtree(parts, ignore_errors=True)
        return Examples.load(path)

    def student(self, teacher: nn.Module, items: Examples, loss: str, name: str = "student") -> nn.Module:
        """The teacher's own weights, fine-tuned to answer at once."""
        def make(progress: Path) -> nn.Module:
            model = deepcopy(teacher)
            history = distill(model, items, self.fit_settings("student", loss), epochs=self.settings.student_epochs,
                              seed=self.seed, checkpoint=progress, save_every=self.settings.save_every, name=name)
            self.folder.note("losses", name, history)
            return model
        return self.folder.model(name, make, self.tokenizer, self.device)

    def practice_figures(self, items: Examples) -> dict[str, float]:
        """Percent of the practice questions dropped for want of an answer, and of the teacher's answers that are true."""
        asked, truth = self.settings.practice_questions, self.true_answers(items)
        true = sum(items.answers[i] == truth.answers[i] for i in range(len(items)))
        return {"practice_dropped": 100 * (asked - len(items)) / asked, "practice_true": 100 * true / len(items)}

    def true_answers(self, items: Examples) -> Examples:
        """The student's questions with true answers in place of the teacher's: what perfect labels would give."""
        prefix = len(student_template(""))
        questions = [self.tokenizer.decode(items.prompts[i])[prefix:] for i in range(len(items))]
        return direct_examples(questions, self.tokenizer)

    def baselines(self, teacher: nn.Module) -> dict[str, nn.Module]:
        """The paper's two baselines, on the teacher's labelled questions alone."""
        direct, s = direct_examples(self.train, self.tokenizer), self.settings
        both = Examples.join([scratchpad_examples(self.train, self.tokenizer, s.scratchpad), direct])
        stages = {"scratchpad_then_direct": (teacher, direct, s.direct_epochs),
                  "scratchpad_and_direct": (self.base, both, s.direct_epochs)}
        return {name: self.folder.model(name, lambda progress: self.supervised(start, data, epochs, name, progress),
                                        self.tokenizer, self.device)
                for name, (start, data, epochs) in stages.items()}

    def table(self, models: dict[str, nn.Module]) -> dict[str, dict]:
        """Every model on the same unseen questions."""
        questions = test_questions(self.settings.test_questions, self.settings.max_digits)
        longest = {True: self.max_scratchpad, False: 2 * self.settings.max_digits + 4}
        return {name: self.folder.value(f"test_{name}", lambda: asdict(evaluate(
                    model, self.tokenizer, questions, name == "teacher", longest[name == "teacher"], f"test {name}")))
                for name, model in models.items()}

    def run(self) -> dict[str, dict] | None:
        """All stages in the order of the paper; the scores of Table 3, or None where --until stopped it earlier."""
        until = self.settings.until
        teacher = self.teacher()
        self.check_teacher(teacher)
        if until == "teacher":
            return None
        items = self.practice(teacher)
        figures = self.folder.value("practice_figures", lambda: self.practice_figures(items))
        print(show_example(self.context, self.tokenizer, teacher, items, self.max_scratchpad))
        print(f"practice set: {len(items)} questions, {figures['practice_dropped']:.2f} % dropped without an answer, "
              f"{figures['practice_true']:.2f} % of the answers true\n")
        if until == "practice":
            return None
        models = {"teacher": teacher, "before": teacher, "after": self.student(teacher, items, self.settings.loss)}
        if until == "student":
            return None
        if self.settings.all_rows:
            models["after_hard"] = self.student(teacher, items, "hard", "student_hard")
            models["true_answers"] = self.student(teacher, self.true_answers(items), "hard", "student_true")
        return self.table({**models, **self.baselines(teacher)})


def show_label(tokenizer: TextTokenizer, labels: SoftLabels) -> str:
    """The first label's likeliest tokens, with their share."""
    weights = labels.weights[: int(labels.ids.starts[1])]
    shares = (weights / (1 if weights.is_floating_point() else weights.sum())).tolist()
    ranked = sorted(zip(shares, tokenizer.pieces(labels.ids[0])), reverse=True)
    return ", ".join(f"{token!r} {share:.2f}" for share, token in ranked[:5])


def show_example(context: Context, tokenizer: TextTokenizer, teacher: nn.Module, items: Examples, max_new_tokens: int) -> str:
    """One practice item, whole: what the teacher sees and says, what the student sees, and the label of its first token."""
    question = tokenizer.decode(items.prompts[0])[len(context.student("")):]
    prompt = tokenizer.encode(context.teacher(question))
    completion = generate(teacher, [prompt], max_new_tokens, generator=torch.Generator(next(teacher.parameters()).device),
                          precision="auto")[0]
    found = context.extract(completion)
    return "\n".join(["", "One practice item",
                      f"  teacher prompt    {context.teacher(question)}",
                      f"  completion        {tokenizer.decode(completion)}",
                      f"  extracted answer  {tokenizer.decode(completion[found]) if found else '(none)'}",
                      f"  student prompt    {context.student(question)}",
                      f"  practised answer  {tokenizer.decode(items.answers[0])}",
                      f"  its first label   {show_label(tokenizer, items.labels)}", ""])


Settings = AdditionSettings
SCALES = {"pocket": {}, "paper": PAPER_SCALE}


def train(settings: AdditionSettings, seeds: list[int], out: Path, device: torch.device, publish: bool = False) -> None:
    """`train.py --task addition`: every seed's stages, then the table and the record."""
    scores, folders = [], seed_folders(settings, seeds, out, device)
    for seed, folder in zip(seeds, folders):
        print(f"\nSeed {seed}, {folder.path}")
        scores.append(AdditionRun(settings, seed, folder, device).run())
    if None in scores:
        print(f"stopped after the stage {settings.until}, as asked")
        return
    result = make_record(settings, seeds, scores, folders)
    write_record(result, out, publish)
    print(f"\n{addition_table(result)}\n\n{minutes_line(result)}\nModels, practice set and record.json: {out}")


def make_record(settings: AdditionSettings, seeds: list[int], scores: list[dict], folders: list[RunFolder]) -> dict:
    """Scores of all seeds → the JSON record; by digits and by carry run, the mean over the seeds."""
    def mean(name: str, part: str) -> dict[str, float]:
        return {key: round(float(np.mean([s[name][part][key] for s in scores])), 2) for key in scores[0][name][part]}
    names = list(scores[0])
    metrics = {name: [s[name]["accuracy"] for s in scores] for name in names}
    metrics["token_ratio"] = [s["teacher"]["tokens"] / s["after"]["tokens"] for s in scores]
    figures = [folder.notes("practice_figures") for folder in folders]
    metrics |= {name: [f[name] for f in figures] for name in figures[0]}
    losses = [folder.notes("losses") for folder in folders]
    final = {name: [round(seed[name][-1], 5) for seed in losses if name in seed] for name in losses[0]}
    breakdown = {part: {name: mean(name, part) for name in names} for part in ("by_digits", "by_carry_run")}
    return record("addition", settings.scale, seeds, settings, folders, metrics, paper=PAPER, final_losses=final, **breakdown)


def ask(model: nn.Module, tokenizer: TextTokenizer, arguments) -> str:
    """`eval.py --ask`: the completion for '12 + 34'. Raises ValueError for what is no addition."""
    question, step_by_step = arguments.ask, arguments.step_by_step
    sides = [side.strip() for side in question.split("+")]
    if len(sides) != 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise ValueError(f"--ask {question!r}: ask for the sum of two numbers, for example '12345678 + 87654321'")
    spaced = " + ".join(" ".join(side) for side in sides)
    prompt = tokenizer.encode((teacher_template if step_by_step else student_template)(spaced))
    text = tokenizer.decode(generate(model, [prompt], arguments.max_new_tokens or LONGEST, temperature=0, precision="auto")[0])
    return text if step_by_step else text.replace(" ", "")


def test(model: nn.Module, tokenizer: TextTokenizer, arguments) -> None:
    """`eval.py --task addition`: accuracy on the table's unseen questions, none of which the model has practised."""
    questions = test_questions(arguments.questions, arguments.max_digits)
    assert_unseen(questions, Path(arguments.model).parent, tokenizer)
    score = evaluate(model, tokenizer, questions, arguments.step_by_step, arguments.max_new_tokens or LONGEST)
    print(f"exact match on {len(questions)} unseen questions: {score.accuracy:.2f} %, {score.tokens:.1f} tokens a question")
    print(f"by digits: {score.by_digits}\nby longest carry run: {score.by_carry_run}")


def assert_unseen(questions: list[str], run: Path, tokenizer: TextTokenizer) -> None:
    """Raises ValueError where a test question is in the practice set of the run that the model comes from."""
    assert all(split_of(q) == "test" for q in questions)
    path = run / "practice.safetensors"
    if path.exists():
        practised = Examples.load(path).prompts
        prompts = {tuple(practised[i]) for i in range(len(practised))}
        if any(tuple(tokenizer.encode(student_template(q))) in prompts for q in questions):
            raise ValueError(f"{path} holds test questions: the model has practised them, so its score would mean nothing")
