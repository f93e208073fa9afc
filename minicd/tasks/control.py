"""Controlled generation (paper, appendix A.1): a student ends reviews well, untold, that begin badly.

T_t asks for reviews that change their mind, T_s has only the review. f is the identity: a completion is what
the model samples at temperature 1, up to the end of the line. Towards "negative", all is the other way round:
beginnings are good, endings are to be bad. The prompt that steers the teacher is chosen on beginnings that
are neither practised nor tested.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import nn

from ..distill import Context, PracticeSettings, Template, combine_seeds, identity, practice
from ..labels import Examples
from ..metrics.diversity import diversity
from ..metrics.sentiment import Judge, cross_validated
from ..rounds import RoundSettings
from ..tokenizer import TextTokenizer
from .item import one_item, shortened
from .parts import control_eval, differs
from .parts.control_eval import LONGEST, SAMPLES, ControlEval, completions
from .parts.forgetting import kl_to_base
from .parts.inputs import pool, words
from .parts.instruction_eval import end_with_line
from .parts.reviews import (KINDS, SPLITS, Labelled, first_halves, of_split, read_reviews, texts_of,
                            written_reviews)
from .parts.steering import STEERS, bare_review, steered
from .report import Record, pm, seeds_of, table
from .run import Experiment, Stage
from .settings import DistillSettings, beside, option

FOLDER = "data/control"
ROWS = {"before": "student before", "teacher": "teacher, steered", "after": "**student after**"}
MEASURES = {"share": "as wanted, %", "entropy": "entropy of words, bits", "distinct_2": "distinct-2, %",
            "rouge": "Rouge-L among samples"}
SETS = {"written": "beginnings by the model", "real": "beginnings of real sentences"}


def write_beginnings(model: nn.Module, tokenizer: TextTokenizer, n: int, seed: int = 0,
                     precision: str | None = None) -> Labelled:
    """n beginnings of bad reviews and n of good ones by the model, which ends with the line.

    At temperature 1 a model of this size hardly writes about what it was shown.
    """
    examples = read_reviews(Path(beside(f"{FOLDER}/examples.txt")))
    return written_reviews(model, tokenizer, examples, n, "the beginning of a {kind} review", longest=30,
                           seed=seed, precision=precision, temperature=0.7)


@dataclass
class ControlSettings(DistillSettings):
    """One seed of the experiment."""

    scale: str = option("smollm2", "no pocket model writes reviews: the only scale has a real one")
    model: str = option("data/smollm2", "folder or hub id of a plain language model")
    towards: str = option("both", "how reviews are to end; both: a student for each",
                          choices=(*KINDS, "both"))
    data: str = option("", "file of real sentences, each with a tab and 1 (good) or 0 (bad): they train the "
                       "judge, and the beginnings of others are a second test set")
    beginnings: str = option("", f"file of beginnings, labelled like that; unless given {FOLDER}/"
                             "beginnings.txt, or without it those that the model writes")
    written: int = option(200, "of each kind, if it writes them", least=1, unit="beginnings")
    judge: str = option("auto", "trained on reviews of ours and the sentences of --data, or the model's own "
                        "steered text; auto: data where there is some",
                        choices=("auto", "data", "own"))
    own_texts: int = option(300, "of each kind, that the model writes for its own judge", least=1,
                            unit="reviews")
    steer: str = option("auto", "the teacher's prompt; auto: the best on validation beginnings",
                        choices=("auto", *STEERS))
    practice_inputs: int = option(1024, "of each student, some more than once", least=1, unit="beginnings")
    chunk: int = option(256, "practised at a time: fewer need less memory, and are on disk sooner", least=1,
                        unit="inputs")
    epochs: float = option(2.0, "passes over the practice set", least=1e-3, most=1e6)
    lr: float = option(1e-4, "learning rate", above=0, most=10)
    batch_size: int = option(16, "batch size", least=1)
    max_new_tokens: int = option(LONGEST, "longest completion", least=1, most=4096, unit="tokens")
    test_beginnings: int = option(100, "the most of each test set", least=1, unit="beginnings")
    samples: int = option(SAMPLES, "of each beginning that is judged", least=1, unit="completions")
    save_every: float = option(300.0, "between checkpoints, from which an interrupted run goes on", least=0,
                               unit="seconds", free=True)

    @property
    def directions(self) -> list[str]:
        return list(reversed(KINDS)) if self.towards == "both" else [self.towards]


class Control(Experiment):
    """The share of reviews that end as wanted."""

    TITLE = "Generation is controlled (appendix A.1, Table 4)"
    DIFFERS = differs.CONTROL
    Settings, Eval, RECORDS = ControlSettings, ControlEval, ("smollm2",)
    SCALES = {"smollm2": {}}
    QUICK = dict(towards="positive", written=40, own_texts=40, practice_inputs=96, epochs=1.0, samples=1,
                 test_beginnings=30)
    PAPER = {"before": 24, "teacher": 94, "after": 96}
    ask, examine = staticmethod(control_eval.ask), staticmethod(control_eval.examine)

    def stages(self) -> Iterator[Stage]:
        yield Stage("beginnings", self.make_beginnings)
        yield Stage("judge", self.make_judge, show=lambda judge: (
            f"judge: {judge['accuracy']:.1f} % of {judge['held_out']} held-out reviews right"))
        yield Stage("steer", self.steer, ("beginnings", "judge"), show=lambda shares: "\n".join(
            f"steered towards {towards}, % as wanted: "
            + ", ".join(f"{name} {share:.0f}" for name, share in found.items())
            for towards, found in shares.items()))
        for towards in self.settings.directions:
            yield from self.stages_towards(towards)

    def stages_towards(self, towards: str) -> Iterator[Stage]:
        items, student = f"{towards}/practice", f"{towards}/student"
        yield Stage(f"{towards}/example", lambda: one_item(
            self.context(towards), self.tokenizer, self.base, self.practice_settings, self.seed),
            ("steer",), show=str)
        yield Stage(items, partial(self.practise, towards), ("steer",))
        yield Stage(student, partial(self.student, towards), (items,))
        for row in ROWS:
            yield Stage(f"{towards}/{row}", partial(self.measure, towards, row),
                        (student,) if row == "after" else ("steer",), lambda found, name=f"{towards}, {row}":
                        f"{name}: " + ", ".join(f"{where} {found[where]['share']:.1f} %" for where in found))
        yield Stage(f"{towards}/forgetting", lambda: kl_to_base(
            self.base, self.folder.get(student), self.tokenizer, precision=self.settings.precision),
            (student,))

    # --- data ---

    @cached_property
    def loaded(self) -> tuple[nn.Module, TextTokenizer]:
        model, tokenizer = super().loaded
        end_with_line(model, tokenizer)
        return model, tokenizer

    @cached_property
    def real(self) -> Labelled:
        return read_reviews(Path(self.settings.data)) if self.settings.data else []

    @property
    def beginnings_file(self) -> Path | None:
        file = Path(self.settings.beginnings or beside(f"{FOLDER}/beginnings.txt"))
        return file if self.settings.beginnings or file.exists() else None

    def files(self) -> list[Path]:
        own = [Path(beside(f"{FOLDER}/{name}.txt")) for name in ("reviews", "examples")]
        named = [self.beginnings_file, Path(self.settings.data) if self.settings.data else None]
        return [*own, *filter(None, named)]

    def practice_item(self) -> str:
        return shortened(self.folder.get(f"{self.settings.directions[0]}/example"))

    def prepare(self) -> None:
        if self.settings.judge == "data" and not self.settings.data:
            raise ValueError("--judge data: there are no sentences to train it on; name a file with --data")
        if self.real and {label for _, label in first_halves(of_split(self.real, "test"))} != {0, 1}:
            raise ValueError(f"{self.settings.data}: too few of the sentences are for tests and long "
                             "enough to have beginnings")

    def make_beginnings(self) -> Labelled:
        """Those of the file, or by the model: the same for all seeds. Each split has some of each kind."""
        s, file = self.settings, self.beginnings_file
        made = read_reviews(file) if file else write_beginnings(self.base, self.tokenizer, s.written,
                                                                precision=s.precision)
        for split in SPLITS:
            if {label for _, label in of_split(made, split)} != {0, 1}:
                raise ValueError(f"{file or 'what the model wrote'}: {len(made)} beginnings leave none of "
                                 f"one kind for {split}; more are needed (--written, --beginnings)")
        return made

    def beginnings(self, towards: str, split: str) -> list[str]:
        """Of the kind that is to be turned: bad ones for good endings."""
        return texts_of(of_split(self.folder.get("beginnings"), split), 1 - KINDS.index(towards))

    def tests(self, towards: str) -> dict[str, list[str]]:
        """Both test sets by name. No real sentence of the second one has trained the judge or the student."""
        used = {words(x) for split in ("practice", "validation") for x in self.beginnings(towards, split)}
        halves = texts_of(first_halves(of_split(self.real, "test")), 1 - KINDS.index(towards))
        real = [x for x in halves if words(x) not in used]
        sets = {"written": self.beginnings(towards, "test"), "real": real}
        return {name: texts[: self.settings.test_beginnings] for name, texts in sets.items() if texts}

    # --- the judge ---

    @cached_property
    def ours(self) -> Labelled:
        return read_reviews(Path(beside(f"{FOLDER}/reviews.txt")))

    def make_judge(self) -> dict[str, Any]:
        training, held_out = self.judge_reviews()
        judge = Judge.train(training)
        found = {"accuracy": judge.accuracy(held_out), "trained_on": len(training),
                 "held_out": len(held_out), "weights": judge.weights}
        if self.real and self.settings.judge != "own":
            found["cross_validated"] = cross_validated(self.real, self.ours)
        return found

    def judge_reviews(self) -> tuple[Labelled, Labelled]:
        """What the judge is trained on, and what it is measured on: real sentences where there are some."""
        s = self.settings
        if self.real and s.judge != "own":
            return [*of_split(self.real, "practice", "validation"), *self.ours], of_split(self.real, "test")
        shown = of_split(self.ours, "practice", "validation")
        own = written_reviews(self.base, self.tokenizer, shown, s.own_texts, "{kind} review", longest=80,
                              precision=s.precision)
        return [*own, *shown], self.real or of_split(self.ours, "test")

    @cached_property
    def judge(self) -> Judge:
        return Judge(self.folder.get("judge")["weights"])

    # --- teacher and student ---

    def steer(self) -> dict[str, dict[str, float]]:
        """Direction → prompt → percent of validation reviews that the teacher ends as wanted."""
        names = STEERS if self.settings.steer == "auto" else [self.settings.steer]
        def share(towards: str, name: str) -> float:
            beginnings = self.beginnings(towards, "validation")
            texts = self.complete_all(self.base, steered(name, towards), beginnings, f"{name}, {towards}")
            return self.judge.share(texts, KINDS.index(towards))
        return {towards: {name: share(towards, name) for name in names}
                for towards in self.settings.directions}

    def teacher(self, towards: str) -> Template:
        shares = self.folder.get("steer")[towards]
        return steered(max(shares, key=shares.get), towards)

    def context(self, towards: str) -> Context:
        inputs = pool(self.beginnings(towards, "practice"))
        return Context(inputs, self.teacher(towards), bare_review, identity)

    def distils(self) -> tuple[Context, RoundSettings] | None:
        """Where there is a file of beginnings; those that the model is to write are not there yet."""
        s, name = self.settings, self.settings.steer
        if not self.beginnings_file:
            return None
        teacher = steered([*STEERS][-1] if name == "auto" else name, s.directions[0])
        inputs = pool([text for text, _ in read_reviews(self.beginnings_file)])
        how = RoundSettings(self.practice_settings, s.fit_settings(), s.practice_inputs)
        return Context(inputs, teacher, bare_review, identity), how

    @property
    def practice_settings(self) -> PracticeSettings:
        s = self.settings
        return replace(s.practice_settings(s.max_new_tokens), chunk=s.chunk)

    def practise(self, towards: str) -> Examples:
        name = f"{towards}/practice"
        return practice(self.base, self.tokenizer, self.context(towards), self.settings.practice_inputs,
                        self.practice_settings, seed=combine_seeds((self.seed, KINDS.index(towards))),
                        folder=self.folder.path / f"{name}.parts", name=name)

    def student(self, towards: str) -> nn.Module:
        items = self.folder.get(f"{towards}/practice")
        return self.fit_copy(self.base, items, self.settings.fit_settings(), self.settings.epochs,
                             f"{towards}/student")

    # --- figures ---

    def complete_all(self, model: nn.Module, template: Template, beginnings: list[str],
                     name: str) -> list[str]:
        s, generator = self.settings, torch.Generator(self.device).manual_seed(combine_seeds((self.seed, 7)))
        prompts = [template(x) for x in beginnings for _ in range(s.samples)]
        return completions(model, self.tokenizer, prompts, s.max_new_tokens, generator, s.precision, name)

    def measure(self, towards: str, row: str) -> dict[str, dict[str, Any]]:
        """Test set → the share of endings as wanted, how diverse they are, and what was judged."""
        model = self.folder.get(f"{towards}/student") if row == "after" else self.base
        template = self.teacher(towards) if row == "teacher" else bare_review
        found = {}
        for where, beginnings in self.tests(towards).items():
            texts = self.complete_all(model, template, beginnings, f"{row}, {towards}")
            found[where] = {"share": self.judge.share(texts, KINDS.index(towards)), **diversity(texts),
                            "texts": texts}
        return found

    def figures(self) -> dict[str, Any]:
        """Shares by row; of the second direction and the second test set with its name behind."""
        metrics, measures, judge = {}, {}, self.folder.get("judge")
        for towards in self.settings.directions:
            end = "" if towards == "positive" else "_negative"
            for row in ROWS:
                for where, found in self.folder.get(f"{towards}/{row}").items():
                    metrics[row + end + "_real" * (where == "real")] = found["share"]
                    values = {name: found[name] for name in MEASURES}
                    measures.setdefault(towards, {}).setdefault(where, {})[row] = values
            metrics[f"forgetting{end}"] = self.folder.get(f"{towards}/forgetting")
        metrics["judge"] = judge["accuracy"]
        if "cross_validated" in judge:
            metrics["judge_cross_validated"] = judge["cross_validated"]
        return {"metrics": metrics, "measures": measures,
                "judged": {name: judge[name] for name in ("trained_on", "held_out")},
                "steers": self.folder.get("steer")}

    @classmethod
    def table(cls, record: Record) -> str:
        """A table for each direction and test set; the paper's figures are its shares towards positive."""
        metrics, parts = record["metrics"], [judge_line(record)]
        for towards, sets in record["measures"].items():
            for where, rows in sets.items():
                paper = record["paper"] if towards == "positive" else {}
                lines = [[ROWS[row], *(f"{values[name]:.1f}" for name in MEASURES), paper.get(row, "")]
                         for row, values in rows.items()]
                parts.append(f"Towards {towards}, {SETS[where]}, {seeds_of(record)}\n\n"
                             + table(["", *MEASURES.values(), "paper, %"], lines))
            kl = metrics["forgetting" if towards == "positive" else "forgetting_negative"]
            shares = record["steers"][towards]
            parts.append("The teacher's prompts on validation beginnings: " + ", ".join(
                f"{name} {share:.0f} %" for name, share in shares.items())
                + f". Forgetting, KL of the base to the student on neutral text: {pm(kl, 2)} nats a token.")
        return "\n\n".join(parts)

    @classmethod
    def headline(cls, record: Record) -> str:
        end = "" if "after" in record["metrics"] else "_negative"
        after, teacher, before = (pm(record["metrics"][row + end]) for row in ("after", "teacher", "before"))
        real = record["settings"]["data"] and record["settings"]["judge"] != "own"
        judge = ", judge from `--data`" if real else ""  # which decides what is wanted
        return (f"{after} % of endings as wanted, {teacher} steered, {before} before "
                f"(paper: 96, 94, 24){judge}")


def judge_line(record: Record) -> str:
    kind = "real sentences" if record["settings"]["data"] else "reviews of ours"
    on = ("real sentences and reviews of ours" if record["settings"]["data"]
          and record["settings"]["judge"] != "own" else "texts by the model itself and by us")
    folds = record["metrics"].get("judge_cross_validated")
    return (f"The judge, trained on {record['judged']['trained_on']:.0f} {on}, is right about "
            f"{pm(record['metrics']['judge'])} % of {record['judged']['held_out']:.0f} {kind} held out"
            + (f"; in five-fold cross-validation over all, {pm(folds)} %." if folds else "."))
