"""What settings and the tensors of a practice set have to be, and whether a function is still the same."""

from __future__ import annotations

import ast
import inspect
import textwrap
import zlib
from typing import Any, Callable

import torch
from torch import Tensor


def check_practice_set(tensors: dict[str, Tensor]) -> None:
    """Raises ValueError where rows, lengths or weights do not fit each other, KeyError where one is missing.

    Nothing is made from the lengths before: a damaged one could ask for petabytes.
    """
    rows = {part: check_ragged(tensors, f"{part}.values", f"{part}.starts")
            for part in ("prompts", "answers", "inputs") if part != "inputs" or "inputs.values" in tensors}
    if "inputs" in rows:
        bytes(tensors["inputs.values"].to(torch.uint8).numpy()).decode()  # else they could not be shown
    check(len(set(rows.values())) == 1, f"it has different numbers of {', '.join(rows)}")
    labels = check_ragged(tensors, "labels.ids", "labels.starts")
    check(labels == len(tensors["answers.values"]), "it does not have a label for each token of the answers")
    weights = tensors["labels.weights"]
    check(weights.shape == tensors["labels.ids"].shape, "labels.weights does not fit labels.ids")
    if weights.is_floating_point():
        check(bool(((weights >= 0) & (weights <= 1.001)).all()), "labels.weights holds no probabilities")
    else:
        check(bool((weights > 0).all()), "labels.weights holds no counts")


def check_ragged(tensors: dict[str, Tensor], values: str, starts: str) -> int:
    """The number of rows, whose starts must be in order and end with the values."""
    flat, ends = tensors[values], tensors[starts]
    check(flat.ndim == 1 and not flat.is_floating_point() and flat.dtype != torch.bool,
          f"{values} is no list of whole numbers")
    check(ends.ndim == 1 and ends.dtype == torch.int64 and len(ends) > 0, f"{starts} is no list of positions")
    check(int(ends[0]) == 0 and int(ends[-1]) == len(flat) and bool((ends[1:] >= ends[:-1]).all()),
          f"{starts} does not fit {values}")
    return len(ends) - 1


def at_least_one(settings: Any, *names: str) -> None:
    """Raises ValueError where a setting is smaller than 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(settings, name)}")


def source_digest(function: Callable) -> int | None:
    """A checksum of a function's source without its comments; None where it has none, as at a prompt."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
        return zlib.crc32(ast.unparse(ast.parse(source)).encode())
    except (OSError, TypeError, SyntaxError):
        return None


def check(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)
