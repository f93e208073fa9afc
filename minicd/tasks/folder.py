"""A run folder: it keeps finished stages, and the checkpoints from which interrupted ones go on."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

import torch
from torch import nn

from ..hf.checkpoint import load, save
from ..labels import Examples
from ..runtime.device import hardware
from ..runtime.files import atomic_json, read_json
from .record import commit


class RunFolder:
    """One seed's folder: for a stage NAME.json, NAME.safetensors (practice) or NAME/ (model), and a note."""

    def __init__(self, path: Path, device: torch.device):
        self.path, self.device = Path(path), device

    def claim(self, settings: Any) -> None:
        """Write settings.json, or check that it is the same if something in the folder depends on it.

        Raises ValueError for other settings or an unwritable folder.
        """
        fields = [field for field in dataclasses.fields(settings) if not field.metadata["free"]]
        file, own = self.path / "settings.json", ("settings.json", "wall.json", "notes")
        new = {field.name: getattr(settings, field.name) for field in fields}
        if file.exists() and any(path.name not in own for path in self.path.iterdir()):
            old, new = read_json(file), json.loads(json.dumps(new))
            different = [f"{k} (there {old.get(k)!r}, now {new.get(k)!r})"
                         for k in {**old, **new} if old.get(k) != new.get(k)]
            if different:
                raise ValueError(f"{self.path} holds a run with other settings: {', '.join(different)}; "
                                 "choose another folder with --out, or delete this one")
            return
        try:
            atomic_json(file, new)
        except OSError as error:
            raise ValueError(f"cannot write to {self.path}: {error.strerror}") from None

    def file(self, stage: str) -> Path | None:
        """Where a finished stage is, or None."""
        files = (self.path / f"{stage}.json", self.path / f"{stage}.safetensors",
                 self.path / stage / "model.safetensors")
        return next((file for file in files if file.exists()), None)

    def get(self, stage: str) -> Any:
        """A finished stage: JSON value, Examples, or model. Raises ValueError if it is missing or damaged."""
        file = self.file(stage)
        if file is None:
            raise ValueError(f"{self.path} has no finished stage {stage}")
        if file.suffix == ".json":
            return read_json(file)
        return Examples.load(file) if file.name != "model.safetensors" else load(file.parent, self.device)[0]

    def keep(self, stage: str, made: Any, tokenizer: Any) -> None:
        """Write what a stage made: a model, Examples, or what JSON can hold."""
        if isinstance(made, nn.Module):
            save(made, tokenizer, self.path / stage)
        elif isinstance(made, Examples):
            made.save(self.path / f"{stage}.safetensors")
        else:
            atomic_json(self.path / f"{stage}.json", made)
        self.checkpoint(stage).unlink(missing_ok=True)
        shutil.rmtree(self.path / f"{stage}.parts", ignore_errors=True)

    def checkpoint(self, stage: str) -> Path:
        """The checkpoint of a stage while it trains."""
        return self.path / f"{stage}.progress.safetensors"

    def borrow(self, other: Path, stages: list[str]) -> None:
        """Copy finished stages and their notes from another run. Raises ValueError where they are missing."""
        for stage in stages:
            source = RunFolder(other, self.device).file(stage)
            if source is None:
                raise ValueError(f"{other / stage} is missing: there is no finished stage to reuse")
            if self.file(stage) is None:
                source = source.parent if source.name == "model.safetensors" else source
                whole_copy(source, self.path / source.relative_to(other))
                note = other / "notes" / note_file(stage)
                if note.exists():
                    whole_copy(note, self.path / note.relative_to(other))

    # --- notes: what the record says of a stage besides its figures ---

    def notes(self) -> dict[str, dict[str, Any]]:
        return {file.stem: read_json(file) for file in sorted((self.path / "notes").glob("*.json"))}

    def note(self, stage: str, **what: Any) -> None:
        file = self.path / "notes" / note_file(stage)
        atomic_json(file, {**(read_json(file) if file.exists() else {}), **what})

    @contextmanager
    def timed(self, stage: str):
        """Add the time spent inside to the stage's minutes, even when interrupted. A kill loses its time."""
        before = self.notes().get(note_file(stage).removesuffix(".json"), {}).get("minutes", 0.0)
        start = time.monotonic()
        try:
            yield
        finally:
            minutes = before + (time.monotonic() - start) / 60
            self.note(stage, minutes=minutes, hardware=hardware(self.device), commit=commit())


def borrow_same(folder: RunFolder, other: Path, settings: Any,
                depends_on: Callable[[Any], dict[str, dict[str, Any]]]) -> None:
    """Copy the finished stages of another run whose settings, as far as `depends_on` names them, are the same.

    Says which are to be made anew. Raises ValueError where the first stage is missing or has other settings.
    """
    file = other / "settings.json"
    if not file.exists():
        raise ValueError(f"{other} is no run folder: it has no settings.json")
    known = {field.name for field in dataclasses.fields(settings)}
    there = type(settings)(**{k: v for k, v in read_json(file).items() if k in known})
    here, there = depends_on(settings), depends_on(there)
    first = next(iter(here))
    for stage, values in here.items():
        different = ", ".join(f"{key} {there[stage][key]!r} there, {value!r} here"
                              for key, value in values.items() if there[stage][key] != value)
        if different and stage == first:
            raise ValueError(f"{other} cannot be reused, its {first} has other settings: {different}")
        finished = RunFolder(other, folder.device).file(stage)
        if different and finished:
            print(f"{stage} is made anew: {different}")
        elif finished or stage == first:
            folder.borrow(other, [stage])


def note_file(stage: str) -> str:
    return f"{stage.replace('/', '--')}.json"


def whole_copy(source: Path, target: Path) -> None:
    """Copy a file or folder, unless it is there. The renaming comes last: a kill leaves no half model."""
    if target.exists():
        return
    half = target.with_name(f".{target.name}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(half, ignore_errors=True)
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, half)
    shutil.rmtree(target, ignore_errors=True)
    half.rename(target)
