"""Your own prompt into your own model: the contexts of a file are practised, distilled and measured.

contexts_file.py says what a file holds. A tenth of each context's inputs, at least 50 and at most half, is
never practised, unless the file has tests of its own; up to 32 more are for the curve alone. On these the
model answers greedily under the teacher's prompt, and the student is measured along the answers, before and
after; on unrelated prompts, how far it moved away from the model that it was.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Iterator

from torch import nn
from tqdm import tqdm

from ..distill import Context, NoAnswers
from ..hf.chat import Chat, bare_adds_system
from ..hf.checkpoint import load
from ..rounds import RoundSettings, rounds
from ..runtime.files import file_checksum, read_checked, read_json
from ..tokenizer import TextTokenizer
from .item import one_item
from .parts import differs, own_forgetting, own_measures as measures
from .parts.contexts_file import ContextsFile, Named, read_contexts
from .parts.inputs import NearCopies, pool
from .parts.natural_instructions import inputs_prompt
from .parts.own_chat import LONGEST, answer, end_plainly, has_messages, spoken_to, talk
from .parts.own_curve import Curve, Validation, plot
from .parts.own_forgetting import others
from .report import Record, seeds_of
from .run import Experiment, Stage
from .settings import DistillSettings, EvalSettings, beside, option

SMALL = 10_000_000  # parameters up to which a model stands ten times the learning rate
FEWEST, UNRELATED = 50, 100  # held-out inputs of a context; unrelated prompts
SHOWN = 3  # test inputs of a context whose answers are shown
VALIDATED = 32  # validation inputs of a context, and at most a fifth of what is not tested
PRESET = dict(practice_inputs=480, chunk=120, batch_size=16, save_every=300.0)  # of a model of 135 million
WORKED = {"company": PRESET | {"max_new_tokens": 48}, "place": PRESET | {"max_new_tokens": 24},
          "think": PRESET | {"max_new_tokens": 40}}  # the files for it in data/contexts
MEASURED = {"before": "before", "after": "after", "supervised": "after_supervised"}  # column → stage
CONTEXTS = "file with the contexts, TOML or JSON; what it holds stands in minicd/tasks/parts/contexts_file.py"


@dataclass
class OwnSettings(DistillSettings):
    """One seed of the experiment."""

    contexts: str = option("", CONTEXTS)
    model: str = option("", "folder or hub id of the model to start from; else what the contexts file names")
    practice_inputs: int = option(2048, "for each context", least=1, unit="inputs")
    epochs: float = option(3.0, "passes over the practice set", least=1e-3, most=1e6)
    lr: float | None = option(None, "learning rate; unless given 1e-3 up to 10 million parameters, else 1e-4",
                              above=0, most=10)
    batch_size: int = option(32, "batch size", least=1)
    chunk: int = option(512, "practised at a time: fewer need less memory, and are on disk sooner", least=1,
                        unit="inputs")
    max_new_tokens: int = option(LONGEST, "longest completion", least=1, most=100_000, unit="tokens")
    most_tests: int = option(200, "held-out inputs of each context to measure", least=1, unit="inputs")
    curve_every: int = option(20, "between points of the validation curve, in multiples of 20; 0: none",
                             least=0, unit="steps")
    supervised: bool = option(False, "besides, a student of the teacher's text alone, without soft labels")
    stop_at_best: bool = option(False, "end each round with the weights of its point with the least mean KL")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop_at_best and not self.curve_every:
            raise ValueError("--stop-at-best needs the curve: --curve-every must not be 0")
        if self.contexts and not self.model:
            self.model = read_contexts(beside(self.contexts)).model or "data/pocket"


@dataclass
class OwnEval(EvalSettings):
    """How eval.py measures a model's folder against the contexts of a file."""

    contexts: str | None = option(None, CONTEXTS + "; as in the run")
    base: str | None = option(None, "the model whose answers under the teacher's prompt are the measure; as "
                              "in the run, or the one that the contexts file names")
    max_new_tokens: int | None = option(None, "longest completion; as in the run, or 128 tokens", least=1)
    most_tests: int | None = option(None, "held-out inputs of each context; as in the run, or 200", least=1)
    chat: bool = option(False, "talk to the model instead, line by line, under the student's prompt")
    teacher: bool = option(False, "to --chat and --ask, under the teacher's prompt")
    context: str = option("", "to --chat and --ask, the name of a context; the file's first unless given")


class Own(Experiment):
    """All contexts of a file, in its rounds."""

    TITLE = "Your own prompts into your own model"
    SCALES = {"pocket": {}, **{name: {"scale": name, "contexts": f"data/contexts/{name}.toml", **how}
                               for name, how in WORKED.items()}}
    RECORDS, DIFFERS = tuple(WORKED), differs.OWN
    Settings, Eval = OwnSettings, OwnEval
    QUICK = dict(practice_inputs=1024, epochs=6.0, max_new_tokens=48, most_tests=50)

    @cached_property
    def file(self) -> ContextsFile:
        if not self.settings.contexts:
            raise ValueError("--contexts is missing: the file with your contexts; data/contexts has six")
        return read_contexts(beside(self.settings.contexts))

    @cached_property
    def loaded(self) -> tuple[nn.Module, TextTokenizer]:
        try:
            model, tokenizer = super().loaded
        except ValueError as error:
            if self.settings.model == self.file.model:
                raise ValueError(f"{self.file.path}: model: {error}") from None
            raise
        end_plainly(self.file, model, tokenizer)
        return model, tokenizer

    @cached_property
    def chat(self) -> Chat | None:
        return Chat.of(beside(self.settings.model)) if has_messages(self.file) else None

    def prepare(self) -> None:
        """Say what would surprise. Raises ValueError where file or inputs are not as they were."""
        kept = self.folder.get("inputs") if self.folder.file("inputs") else {}
        if kept and kept["checksum"] != file_checksum(self.file.path):
            raise ValueError(f"{self.file.path} is not as it was when this run began; choose another folder "
                             "with --out")
        for name, named in self.file.contexts.items():
            texts = distinct(named.source.texts)
            if kept and not named.source.write and kept["texts"][name] != texts:
                raise ValueError(f"{named.place / 'inputs'}: they are not those with which this run began; "
                                 "choose another folder with --out")
            n = len(texts)
            if not (named.source.write or named.tests.texts) and n < 2 * FEWEST:
                tqdm.write(f"{named.place / 'inputs'}: {n} different inputs are few; of these {held_out(n)} "
                           f"are held out for the measures, and {FEWEST} would be better")
            tell_system(self.chat, named, self.file.variables)

    def files(self) -> list[Path]:
        sources = [source for named in self.file.contexts.values() for source in (named.source, named.tests)]
        return [self.file.path, *(source.file for source in sources if source.file)]

    def stages(self) -> Iterator[Stage]:
        yield Stage("inputs", self.inputs)
        yield Stage("example", self.example, ("inputs",), str)
        yield Stage("before", lambda: self.measure(self.base), ("inputs",), measures.told)
        yield Stage("student", self.student, ("before",))
        yield Stage("after", lambda: self.measure(self.folder.get("student")), ("student",), measures.told)
        if self.settings.supervised:
            yield Stage("supervised", lambda: self.student("supervised", "hard"), ("after",))
            yield Stage("after_supervised", lambda: self.measure(self.folder.get("supervised")),
                        ("supervised",), measures.told)
        last = "after_supervised" if self.settings.supervised else "after"
        yield Stage("answers", self.answers, (last,), str)

    def inputs(self) -> dict[str, Any]:
        """The different inputs of each context, those that the model writes among them."""
        texts = {}
        for number, (name, named) in enumerate(self.file.contexts.items()):
            texts[name] = distinct(named.source.texts)
            if named.source.write:
                texts[name] = measures.write_inputs(
                    self.base, self.tokenizer, texts[name], named.source.write, (self.seed, number),
                    self.settings.precision, named.study if named.source.self_study else inputs_prompt)
            if not split(texts[name], named)[2]:
                (named.place / "inputs").wrong("there must be two different inputs, for practice and test")
            asked = [*texts[name], *named.tests.texts]
            check_window(named, self.context(name, asked), asked, self.base, self.tokenizer,
                         self.settings.max_new_tokens)
        return {"checksum": file_checksum(self.file.path), "texts": texts}

    def context(self, name: str, texts: list[str]) -> Context:
        return self.file.contexts[name].context(pool(texts), self.tokenizer, self.chat, self.file.variables)

    def practised(self, name: str) -> Context:
        texts = self.folder.get("inputs")["texts"][name]
        return self.context(name, split(texts, self.file.contexts[name])[2])

    def example(self) -> str:
        settings = self.settings.practice_settings(self.settings.max_new_tokens)
        context = self.practised(self.file.rounds[0][0])
        return one_item(context, self.tokenizer, self.base, settings, self.seed)

    @property
    def how(self) -> RoundSettings:
        s = self.settings
        small = sum(p.numel() for p in self.base.parameters()) <= SMALL
        practice = replace(s.practice_settings(s.max_new_tokens), chunk=s.chunk)
        fit = s.fit_settings(lr=s.lr or (1e-3 if small else 1e-4))
        return RoundSettings(practice, fit, s.practice_inputs, s.epochs, save_every=s.save_every)

    def distils(self) -> tuple[Context, RoundSettings] | None:
        """Where the file has inputs; those that the model is to write are not there yet."""
        name = self.file.rounds[0][0]
        texts = distinct(self.file.contexts[name].source.texts)
        return (self.context(name, texts), self.how) if len(texts) > 1 else None

    def student(self, stage: str = "student", loss: str | None = None) -> nn.Module:
        """All rounds, with this loss or that of the settings; the teacher practises the same each time."""
        parts, how = self.folder.path / f"{stage}.parts", self.how
        how = replace(how, fit=replace(how.fit, loss=loss or how.fit.loss))
        schedule = [[self.practised(name) for name in names] for names in self.file.rounds]
        curve = self.curve(parts) if self.settings.curve_every else None
        start = curve.validation(self.base) if curve else {}
        try:
            student = rounds(self.base, self.tokenizer, schedule, how, recursive=self.file.recursive,
                             seed=self.seed, folder=parts, evaluate=curve)
        except NoAnswers as error:
            raise ValueError(f"{self.file.path}: answer: {error}") from None
        self.folder.note(stage, curve=curve.lines(start) if curve else {})
        return student

    def curve(self, parts: Path) -> Curve:
        """Raises ValueError where --stop-at-best has nothing to judge by."""
        texts = self.folder.get("inputs")["texts"]
        inputs = {name: split(texts[name], named)[1] for name, named in self.file.contexts.items()}
        contexts = {name: (self.context(name, some), some) for name, some in inputs.items()}
        validation = Validation(self.base, self.tokenizer, contexts, self.settings)
        for names in self.file.rounds if self.settings.stop_at_best else ():
            if not validation.rows.keys() & set(names):
                raise ValueError(f"--stop-at-best: {', '.join(names)}: no validation input has an answer; "
                                 "give more inputs")
        return Curve(validation, parts, self.file.rounds, self.settings.curve_every,
                     self.settings.stop_at_best)

    def measure(self, model: nn.Module) -> dict[str, Any]:
        texts = self.folder.get("inputs")["texts"]
        return measure(self.file, texts, self.base, model, self.tokenizer, self.chat, self.settings)

    def answers(self) -> str:
        """The first test inputs of each context, answered by the base and by the students."""
        models = {name: self.folder.get(name) for name in ("student", "supervised") if self.folder.file(name)}
        parts, texts = ["Answers to test inputs"], self.folder.get("inputs")["texts"]
        for name, named in self.file.contexts.items():
            tests = split(texts[name], named)[0][:SHOWN]
            parts.append(measures.side_by_side({"base": self.base, **models}, self.tokenizer,
                                               self.context(name, tests), tests, self.settings))
        return "\n" + "\n\n".join(parts) + "\n"

    def practice_item(self) -> str:
        return super().practice_item() + self.folder.get("answers")

    def figures(self) -> dict[str, Any]:
        """Metrics by context, figure and time; with their intervals under `measures`."""
        found = {when: self.folder.get(stage) for when, stage in MEASURED.items() if self.folder.file(stage)}
        metrics = {f"{name}, {figure}, {when}": value[0] for when, contexts in found.items()
                   for name, figures in contexts.items() for figure, value in figures.items()}
        curve = self.folder.read_note("student").get("curve", {})
        return {"metrics": metrics, "measures": found, "curve": curve}

    @classmethod
    def plot(cls, record: Record, path: Path) -> bool:
        return plot(record.get("curve", {}), path, cls.TITLE)

    @classmethod
    def table(cls, record: Record) -> str:
        return f"{cls.TITLE}, {seeds_of(record)}\n\n{measures.tables(record['measures'])}"

    @classmethod
    def headline(cls, record: Record) -> str:
        """Of the first context. README has room for one of the worked files."""
        if record["scale"] in list(WORKED)[1:]:
            return ""
        found = {when: next(iter(contexts.values())) for when, contexts in record["measures"].items()}
        before, after = (found[when]["kl"][0] / 1000 for when in ("before", "after"))
        text = f"{before:.2f} → {after:.2f} nat a token from the teacher"
        if "supervised" in found:
            text += f" (on its text alone {found['supervised']['kl'][0] / 1000:.2f})"
        if "rules" in found["after"]:
            kept = [found["after"][who][0] for who in ("rules", "teacher_rules")]
            text += ", all rules kept in {:.0f} % of answers (teacher {:.0f})".format(*kept)
        return text

    @classmethod
    def ask(cls, model: nn.Module, tokenizer: TextTokenizer, question: str, settings: OwnEval) -> str:
        """`eval.py --ask`: the answer under the student's prompt of the run's contexts."""
        template = spoken_to(settings, Chat.of_tokenizer(tokenizer))
        return answer(model, tokenizer, template(question), settings)

    @classmethod
    def examine(cls, model: nn.Module, tokenizer: TextTokenizer, settings: OwnEval, folder: Path) -> str:
        """`eval.py`: the same measures of any folder's model."""
        run = next((p for p in [folder, *folder.parents[:3]] if (p / "settings.json").exists()), None)
        if not settings.chat and (settings.teacher or settings.context):
            raise ValueError("--teacher and --context go with --chat or --ask")
        if settings.chat:
            return talk(model, tokenizer, spoken_to(settings, Chat.of(beside(str(folder)))), settings)
        if not settings.contexts:
            raise ValueError("--contexts is missing: the file with the contexts to measure")
        file = read_contexts(beside(settings.contexts))
        known = read_checked(run / "settings.json", {"model": str}, "say --base") if run else {}
        name = settings.base or known.get("model") or file.model or str(folder)
        base, spoken = load(beside(name), next(model.parameters()).device)
        if spoken.backend.get_vocab() != tokenizer.backend.get_vocab():
            raise ValueError(f"--base {name}: its tokenizer is not that of {folder}")
        for each in (base, model):
            end_plainly(file, each, tokenizer)
        texts = {key: distinct(named.source.texts) for key, named in file.contexts.items()}
        if any(named.source.write and not named.tests.texts for named in file.contexts.values()):
            if not run or not (run / "inputs.json").exists():
                raise ValueError(f"{file.path}: a model writes its inputs, which only a run folder has")
            texts |= read_json(run / "inputs.json")["texts"]
        chat = Chat.of(beside(name)) if has_messages(file) else None
        settings = replace(settings, max_new_tokens=settings.max_new_tokens or LONGEST,
                           most_tests=settings.most_tests or OwnSettings.most_tests)
        found = measure(file, texts, base, model, tokenizer, chat, settings)
        return measures.tables({"this model": found})


def measure(file: ContextsFile, texts: dict[str, list[str]], base: nn.Module, model: nn.Module,
            tokenizer: TextTokenizer, chat: Chat | None, settings: Any) -> dict[str, dict[str, list[float]]]:
    """Context → figure → its value and interval; on unrelated prompts under the name "unrelated"."""
    found, students = {}, set()  # the students' prompts, where they are to change
    for name, named in file.contexts.items():
        tests = split(texts[name], named)[0][: settings.most_tests]
        context = named.context(pool(tests), tokenizer, chat, file.variables)
        students |= {context.student(x) for x in [*texts[name], *tests]}
        answers = measures.teacher_answers(base, tokenizer, context, tests, settings)
        if sum(map(bool, answers)) < len(tests) / 10:
            (named.place / "answer").wrong(f"it is found in only {sum(map(bool, answers))} of {len(tests)} "
                                           "answers that the model gives under the teacher's prompt")
        found[name] = measures.along_teacher(base, model, tokenizer, context, tests, answers, settings)
        found[name] |= measures.of_answers(base, model, tokenizer, context, tests, answers, named,
                                           settings)
    given = file.unrelated or [x for name in texts for x in split(texts[name], file.contexts[name])[0]]
    bare = [prompt for prompt in bare_prompts(given, chat, file) if prompt not in students]
    prompts = bare if bare or file.unrelated else others(tokenizer)
    if forgetting := own_forgetting.measure(base, model, tokenizer, prompts[:UNRELATED], settings):
        found["unrelated"] = forgetting
    elif model is not base:
        tqdm.write(f"{file.path}: it has no unrelated prompts, so what was forgotten is not measured")
    return found


def bare_prompts(texts: list[str], chat: Chat | None, file: ContextsFile) -> list[str]:
    """Texts without a context: as they are, or as a user's message."""
    if chat is None:
        return texts
    return [chat.prompt([{"role": "user", "content": x}], **file.variables) for x in texts]


# --- inputs ---


def distinct(texts: list[str]) -> list[str]:
    """Without copies: case and spaces do not count."""
    return list({" ".join(text.split()).casefold(): text for text in reversed(texts)}.values())[::-1]


def held_out(n: int) -> int:
    """A tenth of n inputs, at least 50, at most half."""
    return max(1, min(max(FEWEST, n // 10), n // 2))


def split(texts: list[str], named: Named | None = None) -> tuple[list[str], list[str], list[str]]:
    """Test inputs, validation inputs, and those to practise.

    A hash decides: it is the same in every run, for every seed. Where the context has tests of its own, no
    near copy of them is in the other parts.
    """
    tests = distinct(named.tests.texts) if named else []
    known = NearCopies(tests)
    others = distinct([text for text in texts if text not in known])
    ranked = sorted(others, key=lambda text: (zlib.crc32(text.encode()), text))
    n = 0 if tests else held_out(len(ranked))
    m = n + min(VALIDATED, (len(ranked) - n) // 5)
    return tests or ranked[:n], ranked[n:m], ranked[m:]


def tell_system(chat: Chat | None, named: Named, variables: dict[str, Any]) -> None:
    """Point out a template that gives the bare student a system prompt of its own."""
    student = named.student
    if chat is None or isinstance(student, str) or any(message["role"] == "system" for message in student):
        return
    try:
        adds = bare_adds_system(chat.template, **{**chat.tokens, **variables})
    except ValueError:  # it renders no plain conversation; the example shows what it does
        return
    if adds:
        tqdm.write(f"{named.place / 'student'}: the model's chat template adds a system prompt of its own, "
                   "so the student's prompt is not bare: see the example below")


def check_window(named: Named, context: Context, texts: list[str], model: nn.Module, tokenizer: TextTokenizer,
                 longest: int) -> None:
    """Raises ValueError where a teacher's prompt and its answer do not fit into the model."""
    limit = getattr(model.config, "max_positions", None)
    for template in context.teachers if limit else ():
        n = max(map(len, tokenizer.encode_all([template(x) for x in texts])))
        if n + longest > limit:
            (named.place / "teacher").wrong(f"its longest prompt has {n} tokens, which with {longest} of "
                                            f"its answer (--max-new-tokens) are over the model's {limit}")
