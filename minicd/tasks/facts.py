"""Facts are edited (paper, appendix A.2, Table 5), in CounterFact's file format.

T_t states a new fact and that nothing else changes, T_s is the bare input, f the identity: a few tokens that
go on after a prompt. D are prompts on the edited subject and on others, by templates that no test has or
(self-study) questions that the model writes itself. Every edit has a student of its own. The baseline is
gradient descent on the statement. Prompt and learning rates are chosen on other edits, which no row tests.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Iterator, Sequence

from torch import nn
from tqdm import tqdm

from ..distill import Context, combine_seeds, distill, practice
from ..labels import Examples
from ..metrics.facts import SCORES, Points, balance, mean_scores
from ..rounds import RoundSettings, one_round, rounds
from .item import one_item
from .parts import differs, facts_eval, facts_report
from .parts.facts_data import DATA, OTHERS, RELATIONS, Fact, load_facts, load_relations, one_of_each_relation
from .parts.facts_eval import FactsEval, knows, measure, measure_all, object_tokens
from .parts.facts_prompts import SHAPES, Wording
from .parts.facts_report import ROWS, TABLE_5, edit_line
from .run import Experiment, Stage
from .settings import DistillSettings, beside, option

RATES = ("1e-05", "3e-05", "0.0001", "0.0003")  # of students and of gradient descent, as JSON has keys
STUDENTS = {"templates": ["after"], "self-study": ["after_self_study"], "both": ["after", "after_self_study"]}


@dataclass
class FactSettings(DistillSettings):
    """One seed of the experiment."""

    scale: str = option("smollm2", "smollm2, a real language model; flags change its settings")
    model: str = option("data/smollm2", "folder or hub id of the model whose facts are edited")
    data: str = option(DATA, "file of the edits, like CounterFact's counterfact.json")
    others: str = option(OTHERS, "file of the edits on which prompt and learning rates are chosen")
    edits: int = option(34, "tested: at most so many, one of each relation", least=1, unit="edits")
    tuned: int = option(6, "of --others, on which learning rates are tried", least=1, unit="edits")
    keep_unknown: bool = option(False, "also edits of facts that the model does not know, as in the paper")
    inputs: str = option("both", "what the student practises on: templates, self-study (questions that the "
                         "model writes), or both, a student for each", choices=STUDENTS)
    shape: str = option("auto", "of the teacher's prompt; auto: the best on other edits",
                        choices=("auto", *SHAPES))
    lr: float = option(0.0, f"learning rate of students; 0: the best of {', '.join(RATES)} on other edits",
                       least=0, most=10)
    descent_lr: float = option(0.0, "the same for gradient descent", least=0, most=10)
    descent_steps: int = option(10, "of gradient descent on the statement", least=1, unit="steps")
    practice_inputs: int = option(1024, "for each edit that has a student of its own", least=1, unit="inputs")
    shared_inputs: int = option(96, "for each edit of a student that takes all, at once or one after the "
                                "other", least=1, unit="inputs")
    max_input_tokens: int = option(32, "longest question that the model may write", least=1, unit="tokens")
    max_new_tokens: int = option(8, "of a completion", least=1, most=4096, unit="tokens")
    epochs: float = option(4.0, "passes over the practice set", least=1e-3, most=1e6)
    batch_size: int = option(16, "batch size", least=1)

    def rounds(self, lr: float) -> RoundSettings:
        return RoundSettings(self.practice_settings(self.max_new_tokens), self.fit_settings(lr=lr),
                             self.practice_inputs, self.epochs, save_every=self.save_every)


class Facts(Experiment):
    """Paraphrase and neighbourhood, score and magnitude."""

    TITLE = "Facts are edited (appendix A.2, Table 5)"
    DIFFERS = differs.FACTS
    Settings, Eval, RECORDS = FactSettings, FactsEval, ("smollm2",)
    ask, examine = staticmethod(facts_eval.ask), staticmethod(facts_eval.examine)
    complete, table = staticmethod(facts_report.complete), staticmethod(facts_report.show)
    headline = staticmethod(facts_report.headline)
    SCALES = {"smollm2": {}}
    QUICK = dict(edits=2, tuned=2, inputs="templates", shape="demonstrated", lr=1e-4, descent_lr=1e-4,
                 practice_inputs=48, shared_inputs=48, epochs=3.0)
    PAPER = {f"{row}_{name}": figure for row, four in TABLE_5.items() for name, figure in zip(SCORES, four)}

    def stages(self) -> Iterator[Stage]:
        """What the model knows decides which edits there are."""
        yield Stage("known", self.known)
        yield Stage("shapes", self.shapes, ("known",), lambda s: f"shape of the teacher's prompt: {best(s)}")
        if self.folder.file("known"):
            yield from self.edit_stages()

    def edit_stages(self) -> Iterator[Stage]:
        yield Stage("example", self.example, ("shapes",), str)
        for i, fact in enumerate(self.others):
            yield Stage(f"tune-{i}", partial(self.tune, fact), ("shapes",))
        chosen = ("shapes", *(f"tune-{i}" for i in range(len(self.others))))
        yield Stage("student", self.simultaneous, chosen)  # the longest way first
        yield Stage("simultaneous", lambda: self.measured(self.folder.get("student")), ("student",))
        yield Stage("half", lambda: self.one_by_one(deepcopy(self.base), self.halves[0]), chosen)
        yield Stage("sequential", self.sequential, ("half",))
        for i, fact in enumerate(self.facts):
            yield Stage(f"edit-{i}", partial(self.edit, fact), chosen, partial(edit_line, fact))

    # --- which edits ---

    @cached_property
    def given(self) -> dict[str, list[Fact]]:
        """The edits of both files, whether the model knows the facts or not."""
        s = self.settings
        given = {"facts": one_of_each_relation(load_facts(Path(beside(s.data))), s.edits),
                 "others": load_facts(Path(beside(s.others)))}
        both = {fact.prompt for fact in given["facts"]} & {fact.prompt for fact in given["others"]}
        if both:
            raise ValueError(f"--data and --others share an edit: {both.pop()!r}")
        return given

    def prepare(self) -> None:
        """Unusable files are refused before anything else."""
        _ = self.relations

    def known(self) -> dict[str, list[bool]]:
        """For the edits of both files, whether the model prefers the true object. Names those left out."""
        found = {}
        for name, facts in self.given.items():
            found[name] = [self.settings.keep_unknown
                           or knows(self.base, self.tokenizer, fact) for fact in facts]
            left = [fact.name for fact, known in zip(facts, found[name]) if not known]
            if left:
                tqdm.write(f"{len(left)} {name} are left out, since the model prefers another object: "
                           + "; ".join(left))
            if len(left) == len(facts):
                raise ValueError(f"the model knows none of the {len(left)} {name}: choose another --model, "
                                 "or --keep-unknown")
        return found

    def chosen(self, name: str) -> list[Fact]:
        return [fact for fact, known in zip(self.given[name], self.folder.get("known")[name]) if known]

    @cached_property
    def facts(self) -> list[Fact]:
        return self.chosen("facts")

    @cached_property
    def others(self) -> list[Fact]:
        """Those on which learning rates are tried."""
        given = self.settings.lr and self.settings.descent_lr
        return [] if given else self.chosen("others")[: self.settings.tuned]

    @cached_property
    def relations(self) -> dict:
        return load_relations(Path(beside(RELATIONS)), [*self.given["facts"], *self.given["others"]])

    def files(self) -> list[Path]:
        return [Path(beside(path)) for path in (self.settings.data, self.settings.others, RELATIONS)]

    # --- what is chosen on other edits ---

    def shapes(self) -> dict[str, Points]:
        """Shape of the teacher's prompt → scores on the other edits."""
        given, others = self.settings.shape, self.chosen("others")
        if given != "auto":
            return {given: []}
        return {shape: [self.teacher(fact, shape) for fact in others] for shape in SHAPES}

    @property
    def shape(self) -> str:
        return best(self.folder.get("shapes"))

    @property
    def candidates(self) -> dict[str, Sequence[str]]:
        """The learning rates that come into question, of students and of gradient descent."""
        given = {name: getattr(self.settings, name) for name in ("lr", "descent_lr")}
        return {name: [str(rate)] if rate else RATES for name, rate in given.items()}

    def tune(self, fact: Fact) -> dict[str, dict[str, list[float]]]:
        """Learning rate → scores, of students and of gradient descent, where there is something to choose."""
        of = {"lr": partial(self.students, fact, self.first_row), "descent_lr": partial(self.descents, fact)}
        return {name: of[name](rates) if len(rates) > 1 else {} for name, rates in self.candidates.items()}

    def tried(self, name: str) -> dict[str, Points]:
        """Learning rate → scores on the other edits."""
        each = [self.folder.get(f"tune-{i}")[name] for i in range(len(self.others))]
        return {rate: [scores[rate] for scores in each if scores] for rate in self.candidates[name]}

    def rate(self, name: str) -> str:
        return best(self.tried(name))

    # --- one edit ---

    @property
    def first_row(self) -> str:
        """Of the students, the one whose inputs serve for what has only one student."""
        return STUDENTS[self.settings.inputs][0]

    def seed_of(self, fact: Fact) -> int:
        everything = [*self.given["facts"], *self.given["others"]]
        return combine_seeds((self.seed, everything.index(fact)))

    def context(self, fact: Fact, row: str = "after") -> Context:
        wording, s = Wording(fact, self.relations), self.settings
        inputs = wording.templates() if row == "after" else wording.self_study(
            self.base, self.tokenizer, s.max_input_tokens, s.precision)
        return wording.context(inputs, self.shape)

    def distils(self) -> tuple[Context, RoundSettings]:
        """Where the shape is to be found out, the longest prompt."""
        wording, shape = Wording(self.given["facts"][0], self.relations), self.settings.shape
        shape = [*SHAPES][-1] if shape == "auto" else shape
        return wording.context(wording.templates(), shape), self.settings.rounds(1.0)

    def example(self) -> str:
        context = self.context(self.facts[0], self.first_row)
        return one_item(context, self.tokenizer, self.base, self.settings.rounds(1.0).practice, self.seed)

    def edit(self, fact: Fact) -> dict[str, Any]:
        """Row → the four scores. No student is kept: each has half a gigabyte."""
        rate, s = self.rate("lr"), self.settings
        found = {"before": self.score(self.base, fact), "teacher": self.teacher(fact, self.shape)}
        found |= {row: self.students(fact, row, [rate])[rate] for row in STUDENTS[s.inputs]}
        chosen = self.rate("descent_lr")
        descents = self.descents(fact, [chosen] if s.descent_lr else RATES)
        return found | {"descent": descents[chosen], "descents": descents}

    def score(self, model: nn.Module, fact: Fact) -> list[float]:
        return measure(model, self.tokenizer, fact)

    def teacher(self, fact: Fact, shape: str) -> list[float]:
        return measure(self.base, self.tokenizer, fact, Wording(fact, self.relations).teacher(shape))

    def students(self, fact: Fact, row: str, rates: Sequence[str]) -> dict[str, list[float]]:
        """Learning rate → the scores of its student. All practise on the same items."""
        s, seed = self.settings, self.seed_of(fact)
        items = practice(self.base, self.tokenizer, self.context(fact, row), s.practice_inputs,
                         s.rounds(1.0).practice, seed=seed, name=f"{fact.name}, practice")
        return {rate: self.fitted(fact, items, s.rounds(float(rate)).fit, s.epochs) for rate in rates}

    def descents(self, fact: Fact, rates: Sequence[str]) -> dict[str, list[float]]:
        """Learning rate → scores after gradient descent on the bare statement: last step, same optimiser."""
        s = self.settings
        statement = Examples.hard([self.tokenizer.encode(fact.prompt)],
                                  [object_tokens(self.tokenizer, fact.new)])
        return {rate: self.fitted(fact, statement, s.fit_settings(lr=float(rate), loss="empirical"),
                                  s.descent_steps) for rate in rates}

    def fitted(self, fact: Fact, examples: Examples, settings: Any, epochs: float) -> list[float]:
        """The scores of a copy of the base that is trained on the examples."""
        model = deepcopy(self.base)
        distill(model, examples, settings, epochs=epochs, seed=self.seed_of(fact), name=fact.name)
        return self.score(model, fact)

    # --- many edits ---

    def measured(self, model: nn.Module) -> Points:
        return measure_all(model, self.tokenizer, self.facts)

    @property
    def shared(self) -> RoundSettings:
        """Of a student that takes all edits."""
        return replace(self.settings.rounds(float(self.rate("lr"))), items=self.settings.shared_inputs)

    def simultaneous(self) -> nn.Module:
        """All edits in one round (equation 2)."""
        contexts = [self.context(fact, self.first_row) for fact in self.facts]
        place = self.folder.path / "student.parts"
        return rounds(self.base, self.tokenizer, [contexts], self.shared, seed=self.seed, folder=place,
                      name="all edits")

    def one_by_one(self, student: nn.Module, facts: list[Fact]) -> nn.Module:
        """Edit after edit, each a round from the last student (equation 3); the teacher stays the base."""
        settings = self.shared
        for fact in facts:
            one_round(self.base, student, self.tokenizer, [self.context(fact, self.first_row)], settings,
                      self.seed_of(fact), None, fact.name)
        return student

    def sequential(self) -> dict[str, Points]:
        """Scores of the first half of the edits when they are made, and of all edits at the end."""
        student, half = self.folder.get("half"), self.halves[0]
        then = measure_all(student, self.tokenizer, half)
        return {"half": then, "end": self.measured(self.one_by_one(student, self.halves[1]))}

    @property
    def halves(self) -> tuple[list[Fact], list[Fact]]:
        middle = (len(self.facts) + 1) // 2
        return self.facts[:middle], self.facts[middle:]

    # --- the record ---

    def figures(self) -> dict[str, Any]:
        """Row of the table → the means, and each edit's scores."""
        edits = {fact.name: self.folder.get(f"edit-{i}") for i, fact in enumerate(self.facts)}
        first, sequential = next(iter(edits.values())), self.folder.get("sequential")
        by_edit = {row: {name: edit[row] for name, edit in edits.items()} for row in ROWS if row in first}
        by_edit |= {"simultaneous": dict(zip(edits, self.folder.get("simultaneous"))),
                    "sequential": dict(zip(edits, sequential["end"]))}
        metrics = {f"{row}_{name}": float(mean) for row, points in by_edit.items()
                   for name, mean in zip(SCORES, mean_scores(list(points.values())))}
        halves = {"first_half_then": sequential["half"],
                  "first_half_at_end": sequential["end"][: len(self.halves[0])]}
        metrics |= {name: float(mean_scores(points)[0]) for name, points in halves.items()}
        rates = {rate: {name: edit["descents"][rate] for name, edit in edits.items()}
                 for rate in first["descents"]}
        return {"metrics": metrics, "by_edit": by_edit, "descents": rates, "on_others": self.on_others(),
                "left_out": {fact.name: 1 for fact in self.given["facts"] if fact not in self.facts}}

    def on_others(self) -> dict[str, dict[str, list[float]]]:
        """The mean scores on other edits of everything that was tried there."""
        tried = {"shape": self.folder.get("shapes"), **{name: self.tried(name) for name in self.candidates}}
        return {name: {value: mean_scores(points).tolist() for value, points in values.items() if points}
                for name, values in tried.items()}


def best(tried: dict[str, Points]) -> str:
    """The one with the largest harmonic mean of both scores, or the only one."""
    return max(tried, key=lambda name: balance(tried[name])) if len(tried) > 1 else next(iter(tried))
