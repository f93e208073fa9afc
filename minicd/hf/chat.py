"""Chat templates: messages → the text that a chat model was trained on, as transformers makes it.

A template is a small program in Jinja that comes with the tokenizer, maybe from a stranger: it runs in a
sandbox, where it can change nothing and reach no files.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Sequence

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..runtime.files import atomic_bytes, read_json
from ..tokenizer import Rendered, TextTokenizer
from .checkpoint import resolve

TODAY = datetime(2024, 7, 26)  # of `strftime_now`: Llama's templates name this day where they know no other
ROLES = re.compile(r"<[^<>]*>|\[[^\[\]]*\]|\b(system|user|human|instruction)\b", re.IGNORECASE)
QUESTIONS, ANSWER = ("QUESTIONONE", "QUESTIONTWO"), "ANSWERONE"  # of `added_system`: no template has them
Messages = Sequence[dict[str, Any]]


def render(template: str, messages: Messages, *, add_generation_prompt: bool = True,
           bos_token: str | None = None, eos_token: str | None = None, **more: Any) -> str:
    """Messages (dictionaries with role and content) → a prompt, exactly as transformers renders it.

    `more`: further variables, such as tools, documents, enable_thinking. None for a token: there is none. For
    `strftime_now` it is always 26 July 2024: else the prompt would be another one tomorrow. The text has its
    special tokens: encode it without adding any. Raises ValueError where the template refuses the messages or
    is no template.
    """
    known = {"bos_token": bos_token, "eos_token": eos_token}
    tokens = {name: token for name, token in known.items() if token is not None}
    try:
        return compiled(template).render(**{"messages": messages, "tools": None, "documents": None,
                                            "add_generation_prompt": add_generation_prompt, **tokens, **more})
    except (Exception, MemoryError) as error:  # whatever a program raises: of wrong types, endless recursion
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())
        raise ValueError(f"the chat template cannot render these messages: {reason[:400]}") from None


@lru_cache(maxsize=64)
def compiled(template: str) -> Template:
    """Raises jinja2's TemplateSyntaxError where it is no template."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": TODAY.strftime}
    return environment.from_string(template)


class Generation(Extension):
    """{% generation %} … {% endgeneration %} marks what the model wrote; its content is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("content"), [], [], body).set_lineno(line)

    def content(self, caller: Any) -> str:
        return caller()


def to_json(value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """The filter tojson: Jinja's own would escape < and > for web pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def refuse(message: str) -> None:
    """raise_exception: a template's way to refuse messages."""
    raise TemplateError(message)


# --- the templates of a folder ---


def chat_template(folder: str | Path, name: str = "default") -> str | None:
    """The chat template of a model's folder or hub id; None where it has none.

    It stands in chat_template.jinja (others beside it in additional_chat_templates), or under chat_template
    in tokenizer_config.json or chat_template.json, as a text or as a list of variants with a name each.
    Raises ValueError where there are variants, but none of this name, or a file is damaged.
    """
    found = templates(resolve(folder))
    if found and name not in found:
        raise ValueError(f"{folder} has no chat template named {name!r}, but {', '.join(sorted(found))}")
    return found.get(name)


def templates(folder: Path) -> dict[str, str]:
    """All of a folder's by name. Files of their own come before what stands in JSON, as in transformers."""
    main = folder / "chat_template.jinja"
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    files |= {"default": main} if main.exists() else {}
    if files:
        return {name: read_text(path) for name, path in files.items()}
    for path in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        if found := read_object(path).get("chat_template"):
            return variants(found, path)
    return {}


def variants(found: Any, path: Path) -> dict[str, str]:
    """The value of chat_template in JSON: a text, variants as a list, or as an object by name."""
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        found = {entry.get("name"): entry.get("template") for entry in found}
    found = {"default": found} if isinstance(found, str) else found
    if not isinstance(found, dict) or not all(isinstance(part, str) for pair in found.items()
                                              for part in pair):
        raise ValueError(f"{path}: chat_template must be a text, or a list of named texts")
    return found


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{path} is no text: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty where there is no file. Raises ValueError where it holds something else."""
    content = read_json(path, "is not valid JSON") if path.exists() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} instead of an object")
    return content


# --- prompts ---


@dataclass
class Chat:
    """A model's chat template and the special tokens that it may name."""

    template: str
    tokens: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token, pad_token, …

    @classmethod
    def of(cls, folder: str | Path) -> Chat | None:
        """That of a folder or hub id; None where it has no template. Raises what `chat_template` raises."""
        folder = resolve(folder)
        template, tokens = chat_template(folder), {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            for key, token in read_object(folder / name).items():
                token = token.get("content") if isinstance(token, dict) else token
                if re.fullmatch("[a-z]+_token", key) and isinstance(token, str):
                    tokens[key] = token
        return None if template is None else cls(template, tokens)

    @classmethod
    def of_tokenizer(cls, tokenizer: TextTokenizer) -> Chat | None:
        """That of the folder from which a tokenizer came."""
        with TemporaryDirectory() as folder:
            for name, content in tokenizer.files.items():
                atomic_bytes(Path(folder) / name, content)
            return cls.of(folder)

    def prompt(self, messages: Messages, **more: Any) -> Rendered:
        """The messages as a prompt that ends where the model's answer begins."""
        return Rendered(render(self.template, messages, **{**self.tokens, **more}))


def bare_adds_system(template: str, **more: Any) -> bool:
    """Whether the template writes a system prompt where the messages have none, as Qwen2.5's does."""
    return bool(added_system(template, **more))


def added_system(template: str, **more: Any) -> str:
    """The text that stands before the first user's message, but not before the second one's; "" for none.

    Special tokens and names of roles are no such text: an empty system turn tells the model nothing.
    """
    more, (first, second) = {"bos_token": "<s>", "eos_token": "</s>", **more}, QUESTIONS
    one, two = ({"role": "user", "content": text} for text in QUESTIONS)
    head = render(template, [one], **more).split(first)[0]
    try:
        whole = render(template, [one, {"role": "assistant", "content": ANSWER}, two], **more)
        between = whole.split(ANSWER)[-1].split(second)[0]
    except ValueError:  # a template of one turn
        between = ""
    own = before(head, between)
    return own.strip() if re.search(r"\w", before(ROLES.sub("", head), ROLES.sub("", between))) else ""


def before(text: str, ending: str) -> str:
    """What of a text comes before the end that it shares with another."""
    pairs = zip(reversed(text), reversed(ending))
    alike = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(ending)))
    return text[: len(text) - alike]
