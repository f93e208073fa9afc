"""What train.py and eval.py share: flags from a settings dataclass, near matches for typing errors, one-sentence errors."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from types import ModuleType
from typing import Any, Callable, NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser that knows which flag was meant."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"unknown argument {unknown[0]}{near(unknown[0].split('=')[0], flags)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        sys.exit(f"{self.prog}: {message} (see --help)")


def near(word: str, known: list[str]) -> str:
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def choose(name: str, tasks: dict[str, ModuleType]) -> ModuleType:
    """The task of that name. Raises ValueError with the near match."""
    if name not in tasks:
        raise ValueError(f"there is no task {name!r}{near(name, list(tasks))}; tasks: {', '.join(tasks)}")
    return tasks[name]


def add_settings(parser: Parser, settings: type) -> None:
    """One flag for every field; its help is the field's own explanation and default."""
    for field in dataclasses.fields(settings):
        flag = f"--{field.name.replace('_', '-')}"
        text = f"{field.metadata['help']} (default: {field.default})"
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true", default=None, help=text)
        else:
            kind = count if isinstance(field.default, int) else type(field.default)
            parser.add_argument(flag, type=kind, choices=field.metadata["choices"], metavar=field.name.upper(),
                                help=text.replace("%", "%%"))


def count(text: str) -> int:
    """Every whole number among the settings counts something of which there is at least one."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def settings_from(arguments: argparse.Namespace, settings: type, *presets: dict[str, Any]) -> Any:
    """Defaults, then presets in order, then what was given on the command line."""
    merged: dict[str, Any] = {}
    for preset in presets:
        merged.update(preset)
    names = [field.name for field in dataclasses.fields(settings)]
    merged.update({name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None})
    return settings(**merged)


def guarded(main: Callable[[], None]) -> None:
    """Run main; what a user can cause or mend ends in one sentence instead of a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from the last checkpoint")
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or 'writing'}: {error.strerror or error}")
