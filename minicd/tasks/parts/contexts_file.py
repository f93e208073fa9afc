"""Contexts files: (D, T_t, T_s, f) of the paper's section 2.1, written in TOML or JSON instead of Python.

    model = "data/smollm2"                     # where --model is not given
    rounds = [["support"], ["support"]]        # by name; all at once unless given
    recursive = false
    plain = true                               # a plain language model: its answers end with their line

    [contexts.support]
    teacher = "You are … Question: {input}"    # T_t; or messages [{role = "system", content = "…"}, …]
    student = "{input}"                        # T_s; `teachers = […]` instead of teacher is an ensemble
    inputs = "questions.txt"                   # D; or a list of texts,
                                               # {file = "x.jsonl", field = "question", reference = "answer"},
                                               # {examples = ["…"], write = 200}: the model writes more
    answer = {after = "Answer:"}               # f; or "everything" (default), {between = ["<a>", "</a>"]},
                                               # {pattern = "a regular expression with a (group)"}
    tests = "tests.txt"                        # inputs to measure on; else a tenth of D, at least 50,
                                               # at most half of it
    rules = {ends_with = "Yours, X", never = ["sorry"], pattern = "^[A-Z]"}  # which answers are to keep

With `self_study = true` beside `write`, the model reads the teacher's prompt up to {input} while it writes:
questions about a page that stands there. `rules` are measured, not taught; what an answer must never have is
looked for in capitals and inside words, too.
data/pocket knows the words of data/world/lists.py alone, in prompts such as `reverse : a b c`; what a model
does not know is named in the item that is shown first.
`unrelated`, inputs too, are prompts on which nothing should change; `template` holds further variables of the
chat template, the same for teacher and student. Relative paths start at the file, a model's at the project.
"""

from __future__ import annotations

import json
import re
import tomllib
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from pathlib import Path
from typing import Any, Callable, Iterable, NoReturn

from ...distill import Context, Extractor, Template, identity
from ...hf.chat import Chat
from ...runtime.files import is_number
from ...tokenizer import TextTokenizer
from ..settings import near
from .inputs import Inputs

Prompt = str | list[dict[str, str]]
HOLE = "{input}"
TOP = ("contexts", "rounds", "recursive", "plain", "model", "unrelated", "template")
OF_CONTEXT = ("teacher", "teachers", "student", "inputs", "answer", "tests", "rules")
OF_INPUTS = ("file", "field", "reference", "examples", "write", "self_study")
OF_ANSWER = ("after", "between", "pattern")
OF_RULES = ("ends_with", "never", "pattern")


class Place:
    """A key of a file, for sentences that say what is wrong there."""

    def __init__(self, path: Path, key: str = ""):
        self.path, self.key = path, key

    def __truediv__(self, key: str | int) -> Place:
        dot = "" if isinstance(key, int) or not self.key else "."
        return Place(self.path, self.key + dot + (f"[{key}]" if isinstance(key, int) else key))

    def __str__(self) -> str:
        return f"{self.path}{': ' * bool(self.key)}{self.key}"

    def wrong(self, problem: str) -> NoReturn:
        raise ValueError(f"{self}: {problem}")

    def table(self, value: Any, known: Iterable[str]) -> dict[str, Any]:
        """Raises ValueError where the value is no table, or has a key that is not known."""
        if not isinstance(value, dict):
            self.wrong("it must be a table")
        for key in value:
            if key not in known:
                self.wrong(f"unknown key {key!r}{near(key, known) or '; known: ' + ', '.join(known)}")
        return value

    def text(self, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            self.wrong("it must be a text that is not empty")
        return value

    def flag(self, value: Any) -> bool:
        return value if isinstance(value, bool) else self.wrong("it must be true or false")

    def texts(self, value: Any) -> list[str]:
        if not isinstance(value, list) or not value:
            self.wrong("it must be a list of texts")
        return [(self / i).text(text) for i, text in enumerate(value)]


@dataclass
class Source:
    """D: given inputs with their references, or examples after which the model writes `write` more."""

    texts: list[str]
    references: dict[str, list[str]] = field(default_factory=dict)
    write: int = 0  # then `texts` are the examples
    self_study: bool = False
    file: Path | None = None  # where they stand, if not in the file of contexts


@dataclass
class Named:
    """One context of a file."""

    name: str
    place: Place
    teachers: list[Prompt]
    student: Prompt
    source: Source
    extractor: Callable[[TextTokenizer], Extractor]
    tests: Source = field(default_factory=lambda: Source([]))  # none: some of the inputs
    rules: dict[str, Callable[[str], bool]] = field(default_factory=dict)  # name → does an answer keep it?

    @property
    def references(self) -> dict[str, list[str]]:
        return self.source.references | self.tests.references

    def study(self, examples: Iterable[str]) -> str:
        """The teacher's prompt up to {input}, after which a list of examples begins that the model continues.

        What stands before {input} on its line stands before each example.
        """
        head = str(self.teachers[0]).split(HOLE)[0]
        mark = head.rsplit("\n", 1)[-1]
        return head + "".join(f"{text}\n{mark}" for text in examples).rstrip()

    def context(self, inputs: Inputs, tokenizer: TextTokenizer, chat: Chat | None,
                variables: dict[str, Any]) -> Context:
        """Raises ValueError for messages where the model has no chat template."""
        prompts = (*self.teachers, self.student)
        *teachers, student = [self.template(prompt, chat, variables) for prompt in prompts]
        return Context(inputs, teachers, student, self.extractor(tokenizer))

    def template(self, prompt: Prompt, chat: Chat | None, variables: dict[str, Any]) -> Template:
        if isinstance(prompt, str):
            return lambda x: prompt.replace(HOLE, x)
        if chat is None:
            self.place.wrong("it has chat messages, but the model's folder has no chat template; write its "
                             "prompts as texts")

        def rendered(x: str) -> str:
            filled = [{**message, "content": message["content"].replace(HOLE, x)} for message in prompt]
            try:
                return chat.prompt(filled, **variables)
            except ValueError as error:
                self.place.wrong(str(error))
        return rendered


@dataclass
class ContextsFile:
    """A whole file."""

    path: Path
    contexts: dict[str, Named]
    rounds: list[list[str]]
    recursive: bool = False
    plain: bool = False
    model: str = ""
    unrelated: list[str] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)


def read_contexts(path: str | Path) -> ContextsFile:
    """Raises ValueError, in one sentence with file and key, for whatever cannot be used."""
    path = Path(path)
    top = Place(path)
    raw = top.table(parse(path), TOP)
    contexts = raw.get("contexts")
    if not isinstance(contexts, dict) or not contexts:
        top.wrong("it has no context: write a table [contexts.NAME]")
    if "unrelated" in contexts:
        (top / "contexts" / "unrelated").wrong("it needs another name: this is that of the unrelated prompts")
    named = {name: read_context(name, top / "contexts" / name, value) for name, value in contexts.items()}
    recursive, plain = ((top / key).flag(raw.get(key, False)) for key in ("recursive", "plain"))
    unrelated = read_source(top / "unrelated", raw["unrelated"]) if "unrelated" in raw else Source([])
    if unrelated.write:
        (top / "unrelated").wrong("it must be given, not written by the model")
    model, variables = raw.get("model"), raw.get("template", {})
    if not isinstance(variables, dict):
        (top / "template").wrong("it must be a table of variables")
    rounds = read_rounds(top / "rounds", raw.get("rounds", [list(named)]), named)
    model = "" if model is None else (top / "model").text(model)
    return ContextsFile(path, named, rounds, recursive, plain, model, unrelated.texts, variables)


def parse(path: Path) -> Any:
    """TOML, or JSON where the file's name says so."""
    kind = "JSON" if path.suffix == ".json" else "TOML"
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid {kind}: {error}") from None


def read_rounds(place: Place, rounds: Any, known: dict[str, Named]) -> list[list[str]]:
    if not isinstance(rounds, list) or not rounds:
        place.wrong("it must be a list of rounds, each a list of contexts' names")
    for i, names in enumerate(rounds):
        for name in (place / i).texts(names):
            if name not in known:
                (place / i).wrong(f"there is no context {name!r}{near(name, known)}")
    return rounds


def read_context(name: str, place: Place, raw: Any) -> Named:
    raw = place.table(raw, OF_CONTEXT)
    if ("teacher" in raw) == ("teachers" in raw):
        place.wrong("it needs the teacher's prompt under teacher, or several under teachers")
    if "inputs" not in raw:
        place.wrong("it needs inputs")
    if "teachers" in raw and not (isinstance(raw["teachers"], list) and raw["teachers"]):
        (place / "teachers").wrong("it must be a list of prompts")
    given = {place / "teacher": raw["teacher"]} if "teacher" in raw else {
        place / "teachers" / i: prompt for i, prompt in enumerate(raw["teachers"])}
    teachers = [read_prompt(key, prompt) for key, prompt in given.items()]
    bare = HOLE if isinstance(teachers[0], str) else [{"role": "user", "content": HOLE}]
    source = read_source(place / "inputs", raw["inputs"])
    if source.self_study and not isinstance(teachers[0], str):
        (place / "inputs" / "self_study").wrong("the teacher's prompt must be a text, not messages")
    tests = read_source(place / "tests", raw["tests"]) if "tests" in raw else Source([])
    if tests.write:
        (place / "tests").wrong("they must be given, not written by the model")
    return Named(name, place, teachers, read_prompt(place / "student", raw.get("student", bare)), source,
                 read_answer(place / "answer", raw.get("answer", "everything")), tests,
                 read_rules(place / "rules", raw.get("rules", {})))


def read_prompt(place: Place, prompt: Any) -> Prompt:
    """A text with {input}, or messages of which one has it."""
    if isinstance(prompt, str):
        parts = [prompt]
    elif isinstance(prompt, list) and prompt:
        messages = [(place / i).table(message, ("role", "content")) for i, message in enumerate(prompt)]
        parts = [(place / i / key).text(message.get(key)) for i, message in enumerate(messages)
                 for key in ("role", "content")][1::2]
    else:
        place.wrong("it must be a text, or a list of messages with role and content")
    if not any(HOLE in part for part in parts):
        place.wrong(f"it has no {HOLE}, which says where the input stands")
    return prompt


# --- D ---


def read_source(place: Place, raw: Any) -> Source:
    """Inputs from a file, from a list, or to be written by the model."""
    if isinstance(raw, list):
        return Source(place.texts(raw))
    raw = {"file": raw} if isinstance(raw, str) else place.table(raw, OF_INPUTS)
    if ("file" in raw) == ("examples" in raw):
        place.wrong("it must be a list of texts, or have a file or examples")
    if "examples" in raw:
        n, extra = raw.get("write"), raw.keys() & {"field", "reference"}
        if extra:
            place.wrong(f"{sorted(extra)[0]} belongs to a file, not to examples")
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= 1_000_000:
            (place / "write").wrong("it must say how many inputs the model is to write, 1 or more")
        return Source((place / "examples").texts(raw["examples"]), write=n,
                      self_study=(place / "self_study").flag(raw.get("self_study", False)))
    for key in sorted(raw.keys() & {"write", "self_study"}):
        place.wrong(f"{key} belongs to examples, not to a file")
    file = place.path.parent / (place / "file").text(raw["file"])
    if not file.is_file():
        place.wrong(f"there is no file {file}{near_file(file)}")
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        place.wrong(f"{file} cannot be read: {error}")
    rows = [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
    found = Source([line for _, line in rows])
    if "field" in raw or "reference" in raw:
        found = read_fields(place, file, rows, raw)
    elif file.suffix == ".jsonl":
        place.wrong(f"the lines of {file} are JSON: name the field of the input, field = \"…\"")
    return replace(found, file=file) if found.texts else place.wrong(f"{file} has no inputs")


def near_file(file: Path) -> str:
    return near(file.name, [path.name for path in file.parent.iterdir()]) if file.parent.is_dir() else ""


def read_fields(place: Place, file: Path, rows: list[tuple[int, str]], raw: dict[str, Any]) -> Source:
    """Lines of JSON objects: the input under `field`, perhaps one or several references under `reference`."""
    key, reference = (place / "field").text(raw.get("field")), raw.get("reference")
    source = Source([])
    for number, line in rows:
        here = Place(file, f"line {number}")
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            here.wrong(f"it is not valid JSON: {error}")
        if not isinstance(entry, dict):
            here.wrong("it must be an object")
        for name in filter(None, (key, reference)):
            if name not in entry:
                here.wrong(f"it has no field {name!r}{near(str(name), entry)}")
        source.texts.append(text := Place(file, f"line {number}: {key}").text(entry[key]))
        if reference:
            found, at = entry[reference], Place(file, f"line {number}: {reference}")
            found = str(found) if is_number(found) else found
            source.references[text] = at.texts(found) if isinstance(found, list) else [at.text(found)]
    return source


# --- f ---


def read_answer(place: Place, raw: Any) -> Callable[[TextTokenizer], Extractor]:
    """f of a tokenizer."""
    if raw == "everything":
        return lambda tokenizer: identity
    if isinstance(raw, str):
        place.wrong('it must be "everything", or a table with after, between or pattern')
    raw = place.table(raw, OF_ANSWER)
    if len(raw) != 1:
        place.wrong("it must have one of after, between and pattern")
    kind, value = next(iter(raw.items()))
    here = place / kind
    if kind == "after":
        pattern = re.escape(here.text(value)) + "(?s:(.*))"
    elif kind == "between":
        if len(marks := here.texts(value)) != 2:
            here.wrong("it must be two markers")
        pattern = "(?s:(.*?))".join(map(re.escape, marks))
    else:
        pattern = value
    compiled = read_pattern(here, pattern)
    if not compiled.groups:
        here.wrong("it has no group: put the answer's part into ( )")
    return lambda tokenizer: Span(tokenizer, compiled)


def read_pattern(place: Place, value: Any) -> re.Pattern:
    try:
        return re.compile(place.text(value))
    except (re.error, OverflowError, RecursionError) as error:
        place.wrong(f"it is no regular expression: {error}")


def read_rules(place: Place, raw: Any) -> dict[str, Callable[[str], bool]]:
    """Name of a rule → whether an answer, without spaces around it, keeps it."""
    raw, rules = place.table(raw, OF_RULES), {}
    if "ends_with" in raw:
        end = (place / "ends_with").text(raw["ends_with"]).strip()
        rules["ends_with"] = lambda text: text.endswith(end)
    if "never" in raw:
        words = [word.casefold() for word in (place / "never").texts(raw["never"])]
        rules["never"] = lambda text: not any(word in text.casefold() for word in words)
    if "pattern" in raw:
        pattern = read_pattern(place / "pattern", raw["pattern"])
        rules["pattern"] = lambda text: bool(pattern.search(text))
    return rules


class Span:
    """f: the tokens of the first match's first group; None where there is none, or nothing visible in it.

    Where a border of the group falls inside a token, the token is kept if something visible of the answer is
    in it, else dropped: nothing of the answer is lost, and of the markers the student learns at most a piece.
    `pieces` counts the completions with a visible piece.
    """

    def __init__(self, tokenizer: TextTokenizer, pattern: re.Pattern):
        self.tokenizer, self.pattern, self.pieces = tokenizer, pattern, 0

    def __call__(self, completion: list[int]) -> slice | None:
        text = self.tokenizer.decode(completion)
        match = self.pattern.search(text)
        start, end = match.span(1) if match else (0, 0)
        if not text[start:end].strip():
            return None

        def ends(n: int) -> int:  # where the text of n tokens ends; half a character is not there yet
            return len(commonprefix([self.tokenizer.decode(completion[:n]), text]))
        counts = range(len(completion) + 1)
        first, last = bisect_left(counts, start, key=ends), bisect_left(counts, end, key=ends)
        first -= bool(text[start : ends(first)].strip())  # the token before holds some of the answer, too
        last -= ends(last) > end and not text[ends(last - 1) : end].strip()
        self.pieces += bool(text[ends(first) : start].strip() or text[end : ends(last)].strip())
        return slice(first, last)
