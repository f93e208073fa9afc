"""Progress bars. Parallel processes have a line each."""

from __future__ import annotations

import sys

from tqdm import tqdm

LINE: int | None = None  # this process's line on the terminal; None: it is the only process
NAME = ""  # the prefix of its bars' names


def bar(total: int, name: str, unit: str, initial: int = 0, disable: bool = False) -> tqdm:
    """A bar on this process's line; in a file it is written every ten seconds."""
    terminal = sys.stderr.isatty()
    return tqdm(total=total, desc=f"{NAME}{name}", unit=unit, initial=initial, disable=disable,
                dynamic_ncols=terminal, mininterval=1.0 if terminal else 10.0,
                position=LINE if terminal else None, leave=LINE is None)


def printable(text: str) -> str:
    """The text with escapes for what could steer a terminal: all that is not printable, but for newlines."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
