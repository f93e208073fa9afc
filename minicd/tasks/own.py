"""Your own prompt into your own model: the contexts of a file are practised, distilled and measured.

contexts_file.py says what a file holds. A tenth of each context's inputs, at least 50, is never practised.
On these the model answers greedily under the teacher's prompt, and the student is measured along the answers,
before and after; on unrelated prompts, how far it moved away from the model that it was.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Iterator

from torch import nn
from tqdm import tqdm

from ..distill import Context, NoAnswers, Template
from ..hf.chat import Chat, bare_adds_system
from ..hf.checkpoint import load
from ..rounds import RoundSettings, rounds
from ..runtime.files import file_checksum, read_checked, read_json
from ..runtime.progress import printable
from ..sampling import generate
from ..tokenizer import TextTokenizer
from . import own_measures as measures
from .contexts_file import ContextsFile, Named, read_contexts
from .inputs import pool, tell_unknown_words
from .report import Record, seeds_of
from .run import Experiment, Stage, one_item
from .settings import DistillSettings, EvalSettings, beside, option

SMALL = 10_000_000  # parameters up to which a model stands ten times the learning rate
FEWEST, UNRELATED = 50, 100  # held-out inputs of a context; unrelated prompts
CONTEXTS = "file with the contexts, TOML or JSON; what it holds stands in minicd/tasks/contexts_file.py"


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
    max_new_tokens: int = option(128, "longest completion", least=1, most=100_000, unit="tokens")
    most_tests: int = option(200, "held-out inputs of each context to measure", least=1, unit="inputs")

    def __post_init__(self) -> None:
        super().__post_init__()
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
    teacher: bool = option(False, "to --chat, under the teacher's prompt")
    context: str = option("", "to --chat, the name of a context; the first of the file unless given")


class Own(Experiment):
    """All contexts of a file, in its rounds."""

    TITLE = "Your own prompts into your own model"
    RECORDS = ()
    Settings, Eval = OwnSettings, OwnEval
    QUICK = dict(practice_inputs=1024, epochs=6.0, max_new_tokens=48, most_tests=50)

    @cached_property
    def file(self) -> ContextsFile:
        if not self.settings.contexts:
            raise ValueError("--contexts is missing: the file with your contexts; data/contexts has three")
        return read_contexts(beside(self.settings.contexts))

    @cached_property
    def chat(self) -> Chat | None:
        return Chat.of(beside(self.settings.model)) if has_messages(self.file) else None

    def prepare(self) -> None:
        """Say what would surprise. Raises ValueError where the file is not as it was when the run began."""
        checksum = file_checksum(self.file.path)
        if self.folder.file("inputs") and self.folder.get("inputs")["checksum"] != checksum:
            raise ValueError(f"{self.file.path} is not as it was when this run began; choose another folder "
                             "with --out")
        for name, named in self.file.contexts.items():
            n = len(distinct(named.source.texts))
            if not named.source.write and n < 2 * FEWEST:
                tqdm.write(f"{named.place / 'inputs'}: {n} different inputs are few; of these {held_out(n)} "
                           f"are held out for the measures, and {FEWEST} would be better")
            tell_system(self.chat, named, self.file.variables)

    def files(self) -> list[Path]:
        return [self.file.path]

    def stages(self) -> Iterator[Stage]:
        yield Stage("inputs", self.inputs)
        yield Stage("example", self.example, ("inputs",), str)
        yield Stage("before", lambda: self.measure(self.base), ("inputs",), measures.told)
        yield Stage("student", self.student, ("before",))
        yield Stage("after", lambda: self.measure(self.folder.get("student")), ("student",), measures.told)

    def inputs(self) -> dict[str, Any]:
        """The different inputs of each context, those that the model writes among them."""
        texts = {}
        for number, (name, named) in enumerate(self.file.contexts.items()):
            texts[name] = distinct(named.source.texts)
            if named.source.write:
                texts[name] = measures.write_inputs(
                    self.base, self.tokenizer, texts[name], named.source.write, (self.seed, number),
                    self.settings.precision)
            if len(texts[name]) < 2:
                (named.place / "inputs").wrong("there must be two different inputs, for practice and test")
            check_window(named, self.context(name, texts[name]), texts[name], self.base, self.tokenizer,
                         self.settings.max_new_tokens)
        return {"checksum": file_checksum(self.file.path), "texts": texts}

    def context(self, name: str, texts: list[str]) -> Context:
        return self.file.contexts[name].context(pool(texts), self.tokenizer, self.chat, self.file.variables)

    def practised(self, name: str) -> Context:
        return self.context(name, split(self.folder.get("inputs")["texts"][name])[1])

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

    def student(self) -> nn.Module:
        schedule = [[self.practised(name) for name in names] for names in self.file.rounds]
        try:
            return rounds(self.base, self.tokenizer, schedule, self.how, recursive=self.file.recursive,
                          seed=self.seed, folder=self.folder.path / "student.parts")
        except NoAnswers as error:
            raise ValueError(f"{self.file.path}: answer: {error}") from None

    def measure(self, model: nn.Module) -> dict[str, Any]:
        texts = self.folder.get("inputs")["texts"]
        return measure(self.file, texts, self.base, model, self.tokenizer, self.chat, self.settings)

    def figures(self) -> dict[str, Any]:
        """Metrics by context, figure and time; with their intervals under `measures`."""
        found = {when: self.folder.get(when) for when in ("before", "after")}
        metrics = {f"{name}, {figure}, {when}": value[0] for when, contexts in found.items()
                   for name, figures in contexts.items() for figure, value in figures.items()}
        return {"metrics": metrics, "measures": found}

    @classmethod
    def table(cls, record: Record) -> str:
        return f"{cls.TITLE}, {seeds_of(record)}\n\n{measures.tables(record['measures'])}"

    @classmethod
    def examine(cls, model: nn.Module, tokenizer: TextTokenizer, settings: OwnEval, folder: Path) -> str:
        """`eval.py`: the same measures of any folder's model."""
        run = next((p for p in [folder, *folder.parents[:3]] if (p / "settings.json").exists()), None)
        if settings.chat:
            return talk(model, tokenizer, spoken_to(settings, folder), settings)
        if not settings.contexts:
            raise ValueError("--contexts is missing: the file with the contexts to measure")
        file = read_contexts(beside(settings.contexts))
        known = read_checked(run / "settings.json", {"model": str}, "say --base") if run else {}
        name = settings.base or known.get("model") or file.model or str(folder)
        base, spoken = load(beside(name), next(model.parameters()).device)
        if spoken.backend.get_vocab() != tokenizer.backend.get_vocab():
            raise ValueError(f"--base {name}: its tokenizer is not that of {folder}")
        texts = {key: distinct(named.source.texts) for key, named in file.contexts.items()}
        if any(named.source.write for named in file.contexts.values()):
            if not run or not (run / "inputs.json").exists():
                raise ValueError(f"{file.path}: a model writes its inputs, which only a run folder has")
            texts |= read_json(run / "inputs.json")["texts"]
        chat = Chat.of(beside(name)) if has_messages(file) else None
        settings = replace(settings, max_new_tokens=settings.max_new_tokens or OwnSettings.max_new_tokens,
                           most_tests=settings.most_tests or OwnSettings.most_tests)
        found = measure(file, texts, base, model, tokenizer, chat, settings)
        return measures.tables({"this model": found})


def measure(file: ContextsFile, texts: dict[str, list[str]], base: nn.Module, model: nn.Module,
            tokenizer: TextTokenizer, chat: Chat | None, settings: Any) -> dict[str, dict[str, list[float]]]:
    """Context → figure → its value and interval; on unrelated prompts under the name "unrelated"."""
    found, students = {}, set()
    for name, named in file.contexts.items():
        tests = split(texts[name])[0][: settings.most_tests]
        context = named.context(pool(tests), tokenizer, chat, file.variables)
        students |= {context.student(x) for x in texts[name]}
        answers = measures.teacher_answers(base, tokenizer, context, tests, settings)
        if sum(map(bool, answers)) < len(tests) / 10:
            (named.place / "answer").wrong(f"it is found in only {sum(map(bool, answers))} of {len(tests)} "
                                           "answers that the model gives under the teacher's prompt")
        found[name] = measures.along_teacher(base, model, tokenizer, context, tests, answers, settings)
        found[name] |= measures.of_answers(base, model, tokenizer, context, tests, answers,
                                           named.source.references, settings)
    prompts = [p for p in unrelated(file, texts, chat) if p not in students][:UNRELATED]
    if prompts and model is not base:
        found["unrelated"] = measures.forgotten(base, model, tokenizer, prompts, settings)
    return found


def unrelated(file: ContextsFile, texts: dict[str, list[str]], chat: Chat | None) -> list[str]:
    """Prompts on which nothing should change: the file's, or the inputs of all contexts, bare.

    A bare input that is a student's prompt is none: there the student is to change.
    """
    given = file.unrelated or [x for name in texts for x in split(texts[name])[0]]
    if chat is None:
        return given
    return [chat.prompt([{"role": "user", "content": x}], **file.variables) for x in given]


# --- eval.py --chat ---


def spoken_to(settings: OwnEval, folder: Path) -> Template:
    """How the model is spoken to: in a context of the file, or bare where there is none."""
    chat = Chat.of(beside(str(folder)))
    if not settings.contexts:
        return (lambda x: x) if chat is None else lambda x: chat.prompt([{"role": "user", "content": x}])
    file = read_contexts(beside(settings.contexts))
    name = settings.context or next(iter(file.contexts))
    if name not in file.contexts:
        raise ValueError(f"--context {name}: {file.path} has {', '.join(file.contexts)}")
    named = file.contexts[name]
    return named.template(named.teachers[0] if settings.teacher else named.student, chat, file.variables)


def talk(model: nn.Module, tokenizer: TextTokenizer, template: Template, settings: OwnEval) -> str:
    """Answer line by line, greedily, each as a new conversation; an empty line ends it."""
    print("An empty line ends this.")
    while question := read_line():
        tell_unknown_words(tokenizer, prompt := template(question))
        longest = settings.max_new_tokens or OwnSettings.max_new_tokens
        [answer] = generate(model, [tokenizer.encode(prompt)], longest, 0, precision=settings.precision)
        print(printable(tokenizer.decode(answer)))
    return ""


def read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


# --- inputs ---


def distinct(texts: list[str]) -> list[str]:
    """Without copies: case and spaces do not count."""
    return list({" ".join(text.split()).casefold(): text for text in reversed(texts)}.values())[::-1]


def held_out(n: int) -> int:
    """A tenth of n inputs, at least 50, at most half."""
    return max(1, min(max(FEWEST, n // 10), n // 2))


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Held-out inputs, and those to practise. A hash decides: it is the same in every run, for every seed."""
    ranked = sorted(distinct(texts), key=lambda text: (zlib.crc32(text.encode()), text))
    n = held_out(len(ranked))
    return ranked[:n], ranked[n:]


def has_messages(file: ContextsFile) -> bool:
    return any(not isinstance(prompt, str) for named in file.contexts.values()
               for prompt in (*named.teachers, named.student))


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
