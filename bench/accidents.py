"""What can happen to the bytes of a file."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Callable


def flipped(data: bytes, a: int, b: int, dice: random.Random) -> bytes:
    return data[:a] + bytes([data[a] ^ 1 << dice.randrange(8)]) + data[a + 1 :]


def swapped(data: bytes, a: int, b: int, dice: random.Random) -> bytes:
    size = min(b - a, len(data) - b)
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


ACCIDENTS: dict[str, Callable[[bytes, int, int, random.Random], bytes]] = {
    "flipped": flipped, "swapped": swapped,
    "cut off": lambda data, a, b, dice: data[:a],
    "cut out": lambda data, a, b, dice: data[:a] + data[b:],
    "put in": lambda data, a, b, dice: data[:a] + dice.randbytes(dice.choice([1, 8, 100])) + data[a:],
    "doubled": lambda data, a, b, dice: data[:b] + data[a:],
    "zeroed": lambda data, a, b, dice: data[:a] + bytes(b - a) + data[b:],
    "overwritten": lambda data, a, b, dice: data[:a] + dice.randbytes(b - a) + data[b:]}
SHAPES = ["{}", "[]", "[1]", "3", "null", '"text"', '{"minutes": "long", "accuracy": []}', "[[[", ""]


def accident(kind: str, data: bytes, start: int, end: int, dice: random.Random) -> bytes:
    """Something happens to the bytes between start and end: to a few of them, or to many."""
    a = dice.randrange(start, end)
    b = min(end, a + dice.choice([1, 4, 64, 1000]))
    return ACCIDENTS[kind](data, a, b, dice)


def damage(path: Path, others: list[Path], dice: random.Random) -> list[Path]:
    """Do something to a file, perhaps with another of its kind. Returns what was touched."""
    data, touched = path.read_bytes(), [path]
    how = dice.choice([*ACCIDENTS, "flipped", "flipped", "gone", "shape", "another", "exchanged"])
    others = [other for other in others if other.suffix == path.suffix and other != path]
    if how == "gone":
        path.unlink()
    elif how == "shape" or not data or (how in ("another", "exchanged") and not others):
        path.write_text(dice.choice(SHAPES))
    elif how in ("another", "exchanged"):
        touched.append(other := dice.choice(others))
        path.write_bytes(other.read_bytes())
        if how == "exchanged":
            other.write_bytes(data)
    else:
        path.write_bytes(accident(how, data, 0, len(data), dice))
    return touched
