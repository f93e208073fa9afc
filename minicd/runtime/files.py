"""The files that minicd writes and reads: atomic writes, checksums, and reads that name a damaged file.

What is written here carries checksums, and what is read here is compared with them. Files of others have
none and are read as they are.
"""

from __future__ import annotations

import json
import os
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .memory import out_of_memory

PIECE = 2**24  # bytes read at a time for a checksum
HOME: list[tuple[Path, str]] = []  # the run folder of the stage that is being made, and the run's name


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
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say what was written
        raise
    finally:
        temporary.unlink(missing_ok=True)


def file_checksum(path: Path) -> int:
    """The crc32 of a file's bytes."""
    checksum = 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            checksum = zlib.crc32(piece, checksum)
    return checksum


# --- JSON ---


def read_json(path: Path, problem: str = "is damaged", advice: str = "") -> Any:
    """The file's content. Raises ValueError (path, `problem`, reason, `advice`) where it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, or no text at all
        raise ValueError(f"{path} {problem}: {type(error).__name__}: {error}"
                         + (advice and f"; {advice}")) from None


def atomic_json(path: Path, value: Any) -> None:
    atomic_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_checked(path: Path, values: dict[str, Any]) -> None:
    """A JSON object with its checksum under the key crc32, for `read_checked`."""
    atomic_json(path, values | {"crc32": json_checksum(values)})


def read_checked(path: Path, kinds: dict[str, Any], advice: str, has: str = "") -> dict[str, Any]:
    """The object that `write_checked` wrote, or one from before checksums, which at least has the key `has`.

    `kinds`: the types of the values under some keys; a list holds numbers. Raises ValueError where the file
    is damaged or of another shape.
    """
    values, problem = read_json(path, advice=advice), ""
    checksum = values.pop("crc32", None) if isinstance(values, dict) else None
    if not isinstance(values, dict):
        problem = "it holds no JSON object"
    elif checksum != json_checksum(values) and not (checksum is None and (not has or has in values)):
        problem = "it is not what was written"
    for key in kinds.keys() & values.keys() if not problem else ():
        of_numbers = not isinstance(values[key], list) or all(map(is_number, values[key]))
        if not (isinstance(values[key], kinds[key]) and of_numbers):
            problem = f"what stands under {key!r} is of a wrong type"
    if problem:
        raise ValueError(f"{path} is damaged: {problem}; {advice}")
    return values


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def json_checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


# --- safetensors ---


@contextmanager
def at_home(folder: Path, name: str) -> Iterator[None]:
    """Inside, files that are written into the folder say where they belong, and are read only there."""
    HOME.append((folder, name))
    try:
        yield
    finally:
        HOME.pop()


def place_of(path: Path) -> str:
    """The file's place in the run; empty where no run is at work, or not in this folder."""
    homes = [(folder, name) for folder, name in HOME[-1:] if Path(path).is_relative_to(folder)]
    return "".join(f"{Path(path).relative_to(folder)} of {name}" for folder, name in homes)


@contextmanager
def open_safetensors(path: Path, problem: str = "is damaged", advice: str = "") -> Iterator[Any]:
    """An open file. Errors inside become a ValueError: the path, `problem`, the reason, `advice`."""
    try:
        with safe_open(path, "pt") as file:
            place, here = (file.metadata() or {}).get("place"), place_of(path)
            if place and here and place != here:
                raise ValueError(f"it is {place}")
            yield file
    except Exception as error:  # safetensors has an exception type of its own
        if isinstance(error, FileNotFoundError) or out_of_memory(error):  # which no damage causes
            raise
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} {problem} ({reason})" + (advice and f"; {advice}")) from None


def all_tensors(file: Any) -> dict[str, Tensor]:
    """The tensors of an open file by name. Raises ValueError where one is not what was written."""
    checksums, tensors = read_checksums(file), {}
    for name in file.keys():
        tensors[name] = file.get_tensor(name)
        if checksums and checksums[name] != zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy()):
            raise ValueError(f"{name} is not what was written")
    return tensors


def read_checksums(file: Any) -> dict[str, int]:
    """Name → crc32 of each tensor's bytes, in a file of ours; other files have none.

    Raises ValueError where names, types, shapes or metadata are not what was written.
    """
    metadata = file.metadata() or {}
    if not metadata.keys() & {"crc32", "header_crc32"}:
        return {}
    checksums = json.loads(metadata.get("crc32", "null"))
    parts = {name: file.get_slice(name) for name in file.keys()}
    shapes = {name: [part.get_dtype(), part.get_shape()] for name, part in parts.items()}
    header = metadata.get("header_crc32")  # older files of ours lack it
    if not isinstance(checksums, dict) or checksums.keys() != shapes.keys() or (
            header not in (None, header_checksum(shapes, metadata))):
        raise ValueError("its header is not what was written")
    return checksums


def header_checksum(shapes: dict[str, list], metadata: dict[str, str]) -> str:
    """Of names, types, shapes and metadata; not of the format, which other programs may rewrite."""
    rest = {key: value for key, value in metadata.items() if key not in ("format", "header_crc32")}
    return str(json_checksum([shapes, rest]))


def atomic_safetensors(path: Path, tensors: dict[str, Tensor],
                       metadata: dict[str, str] | None = None) -> None:
    """Write tensors and metadata with their checksums, which `all_tensors` compares.

    Equal content gives equal files, though the library writes its metadata in random order.
    """
    header, parts = laid_out({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
    checksums = {name: zlib.crc32(part) for name, part in zip(header, parts)}
    shapes = {name: [entry["dtype"], entry["shape"]] for name, entry in header.items()}
    metadata = {**(metadata or {}), "crc32": json.dumps(checksums, sort_keys=True)}
    metadata |= {"place": place} if (place := place_of(path)) else {}
    metadata["header_crc32"] = header_checksum(shapes, metadata)
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the library keeps the numbers that follow aligned
    atomic_bytes(path, len(text).to_bytes(8, "little"), text, *parts)


def laid_out(tensors: dict[str, Tensor]) -> tuple[dict[str, dict], list[memoryview]]:
    """The header's entries and the tensors' bytes, in the library's order.

    The library itself would make two copies of everything in memory.
    """
    small = save({name: tensor.flatten()[:1] for name, tensor in tensors.items()})
    header = json.loads(small[8 : 8 + int.from_bytes(small[:8], "little")])
    header = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
    parts, end = [], 0
    for name, entry in header.items():
        parts.append(memoryview(tensors[name].flatten().view(torch.uint8).numpy()))
        entry["shape"] = list(tensors[name].shape)
        entry["data_offsets"] = [end, end := end + parts[-1].nbytes]
    return header, parts


def copy_tensors(source: Path, target: Path) -> None:
    """Copy the tensors of one file into another, unless that is there already or there is nothing to copy."""
    if source.exists() and not target.exists():
        with open_safetensors(source) as file:
            atomic_safetensors(target, all_tensors(file))
