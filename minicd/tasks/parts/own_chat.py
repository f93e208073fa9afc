"""How one talks to a model of own.py: `eval.py --task own --chat` and `--ask`, under a file's prompts."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...distill import Template
from ...hf.chat import Chat
from ...runtime.progress import printable
from ...sampling import generate
from ...tokenizer import TextTokenizer
from ..settings import beside
from .contexts_file import ContextsFile, read_contexts
from .inputs import tell_unknown_words
from .instruction_eval import end_with_line

LONGEST = 128  # tokens of an answer, unless a flag says otherwise


def spoken_to(settings: Any, chat: Chat | None) -> Template:
    """How the model is spoken to: in a context of the file, or bare where there is none."""
    if not settings.contexts:
        return (lambda x: x) if chat is None else lambda x: chat.prompt([{"role": "user", "content": x}])
    file = read_contexts(beside(settings.contexts))
    name = settings.context or next(iter(file.contexts))
    if name not in file.contexts:
        raise ValueError(f"--context {name}: {file.path} has {', '.join(file.contexts)}")
    named = file.contexts[name]
    return named.template(named.teachers[0] if settings.teacher else named.student, chat, file.variables)


def talk(model: nn.Module, tokenizer: TextTokenizer, template: Template, settings: Any) -> str:
    """Answer line by line, greedily, each as a new conversation; an empty line ends it."""
    print("An empty line ends this.")
    while question := read_line():
        print(printable(answer(model, tokenizer, template(question), settings)))
    return ""


def answer(model: nn.Module, tokenizer: TextTokenizer, prompt: str, settings: Any) -> str:
    """The greedy completion, to the end of its line where the contexts file says so."""
    tell_unknown_words(tokenizer, prompt)
    if settings.contexts:
        end_plainly(read_contexts(beside(settings.contexts)), model, tokenizer)
    longest = settings.max_new_tokens or LONGEST
    [written] = generate(model, [tokenizer.encode(prompt)], longest, 0, precision=settings.precision)
    return tokenizer.decode(written)


def read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def end_plainly(file: ContextsFile, model: nn.Module, tokenizer: TextTokenizer) -> None:
    """Where the file says `plain`, answers end with their line. Raises ValueError where no token does."""
    try:
        end_with_line(model, tokenizer) if file.plain else None
    except ValueError:
        raise ValueError(f"{file.path}: plain is for decoders whose tokenizer has new lines, which this "
                         "model is not") from None


def has_messages(file: ContextsFile) -> bool:
    return any(not isinstance(prompt, str) for named in file.contexts.values()
               for prompt in (*named.teachers, named.student))
