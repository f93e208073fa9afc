"""Reads that name a damaged file, and atomic writes: temporary file, fsync, rename."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor


def atomic_bytes(path: Path, *data: bytes | memoryview) -> None:
    """Write `data` whole or not at all: a killed process or a full disk leaves the old file in place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path, problem: str = "is damaged") -> Any:
    """The file's content. Raises ValueError (the path, `problem`, the reason) where it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, or no text at all
        raise ValueError(f"{path} {problem}: {type(error).__name__}: {error}") from None


def atomic_json(path: Path, value: Any) -> None:
    atomic_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


@contextmanager
def open_safetensors(path: Path, problem: str = "is damaged", advice: str = "") -> Iterator[Any]:
    """An open file. Errors inside become a ValueError: the path, `problem`, the reason, `advice`."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors has an exception type of its own
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} {problem} ({reason})" + (advice and f"; {advice}")) from None


def all_tensors(file: Any) -> dict[str, Tensor]:
    """The tensors of an open file by name."""
    return {name: file.get_tensor(name) for name in file.keys()}


def atomic_safetensors(path: Path, tensors: dict[str, Tensor],
                       metadata: dict[str, str] | None = None) -> None:
    """Equal content gives equal files, though the library writes its metadata in random order."""
    data = memoryview(save({k: t.detach().contiguous().cpu() for k, t in tensors.items()}, metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:end]))
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the library keeps the numbers that follow aligned
    atomic_bytes(path, len(text).to_bytes(8, "little"), text, data[end:])
