"""A run folder: it keeps finished stages, and the checkpoints from which interrupted ones go on."""

from __future__ import annotations

import dataclasses
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from torch import nn

from ..hf.checkpoint import load, save
from ..labels import Examples
from ..losses import source
from ..runtime.device import hardware
from ..runtime.files import atomic_json, file_checksum, is_number, read_checked, read_json, write_checked
from ..runtime.lock import LOCK
from .record import commit, joined
from .settings import changes

NUMBER = (int, float)
NOTE = {"stage": str, "minutes": NUMBER, "hardware": str, "commit": str, "precision": str, "losses": list,
        "files": dict}
DATA = "data.json"  # the hashes of the data files
ABOUT = ("wall.json", "notes", DATA, LOCK)  # of a run folder: nothing depends on the settings here
OTHER_OUT = "choose another folder with --out, or delete this one"


class RunFolder:
    """One seed's folder: for a stage NAME.json, NAME.safetensors (practice) or NAME/ (model), and a note."""

    def __init__(self, path: Path, device: torch.device):
        self.path, self.device = Path(path), device

    def claim(self, settings: Any, seed: int | None = None) -> None:
        """Write settings.json, or check that it is the same if something in the folder depends on it.

        Raises ValueError for the run of another task or seed, with other settings, or whose loss was edited
        since, and for an unwritable folder.
        """
        fields = [field for field in dataclasses.fields(settings) if not field.metadata["free"]]
        new = {field.name: getattr(settings, field.name) for field in fields}
        whose = {"loss_source": source(settings.loss) if hasattr(settings, "loss") else None,
                 "kind": type(settings).__name__, "seed": seed}
        file, old = self.path / "settings.json", None
        if file.exists():
            if any(path.name not in (file.name, *ABOUT) for path in self.path.iterdir()):
                return self.check_claim(settings, whose)
            old = file.read_bytes()
        try:
            write_checked(file, new | whose)
        except OSError as error:
            raise ValueError(f"cannot write to {self.path}: {error.strerror}") from None
        changed = old not in (None, file.read_bytes())  # then an abandoned start's minutes are not this run's
        for name in (DATA, *(("notes", "wall.json") if changed else ())):
            remove(self.path / name)

    def check_claim(self, settings: Any, whose: dict[str, Any]) -> None:
        """Raises ValueError where settings.json is of another run. What an old one lacks is not compared."""
        found = read_checked(self.path / "settings.json", {},
                             "delete this folder, or choose another with --out", has="scale")
        there = {name: found.pop(name, None) for name in whose}
        of = {"loss_source": f"the loss {getattr(settings, 'loss', '')} was edited since the run in "
                             f"{self.path} began",
              "kind": f"{self.path} holds a run of another task",
              "seed": f"{self.path} holds a run of seed {there['seed']}, not {whose['seed']}"}
        for name, problem in of.items():
            if None not in (there[name], whose[name]) and there[name] != whose[name]:
                raise ValueError(f"{problem}; {OTHER_OUT}")
        if different := changes(settings, found):
            raise ValueError(f"{self.path} holds a run with other settings: {', '.join(different)}; "
                             f"{OTHER_OUT}")

    def claim_data(self, files: dict[str, str]) -> None:
        """Keep the hashes of the files that the run reads, or check that they are still the same.

        Raises ValueError where they are not. Older folders have none, and are not checked.
        """
        if not (self.path / DATA).exists():
            return write_checked(self.path / DATA, {"files": files})
        here, there = ({(Path(name).name, digest) for name, digest in found.items()}
                       for found in (files, read_data(self.path)))
        if changed := sorted(here ^ there):
            raise ValueError(f"{self.path} holds a run with other data: {changed[0][0]} has changed since; "
                             f"{OTHER_OUT}")

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
        self.check(stage)
        if file.suffix == ".json":
            return read_json(file, advice=f"delete it to run the stage {stage} anew")
        return Examples.load(file) if file.name != "model.safetensors" else load(file.parent, self.device)[0]

    def check(self, stage: str) -> None:
        """Raises ValueError where the files of a finished stage are not those that were kept."""
        found, files = self.file(stage), self.read_note(stage).get("files", {})
        place = found.parent if found.name == "model.safetensors" else found
        advice = f"delete {place} to run the stage {stage} anew"
        if files and str(found.relative_to(self.path)) not in files:
            raise ValueError(f"{found} is damaged: it is not of the stage {stage}; {advice}")
        for name, checksum in files.items():
            if not (path := self.path / name).is_file():
                raise ValueError(f"{path} is missing; {advice}")
            if file_checksum(path) != checksum:
                raise ValueError(f"{path} is damaged: it is not what was written; {advice}")

    def keep(self, stage: str, made: Any, tokenizer: Any) -> None:
        """Write what a stage made: a model, Examples, or what JSON can hold.

        Files get their names when their checksums are noted: a kill leaves no finished stage without.
        """
        half = self.path / f".{stage.replace('/', '--')}.tmp"
        shutil.rmtree(half, ignore_errors=True)
        if isinstance(made, nn.Module):
            save(made, tokenizer, half / stage)
        elif isinstance(made, Examples):
            made.save(half / f"{stage}.safetensors")
        else:
            atomic_json(half / f"{stage}.json", made)
        names = [path.relative_to(half) for path in half.rglob("*") if path.is_file()]
        names.sort(key=lambda name: name.name == "model.safetensors")  # which makes a stage finished
        self.note(stage, files={str(name): file_checksum(half / name) for name in names})
        for name in names:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (half / name).replace(self.path / name)
        shutil.rmtree(half)
        self.checkpoint(stage).unlink(missing_ok=True)
        shutil.rmtree(self.path / f"{stage}.parts", ignore_errors=True)

    def checkpoint(self, stage: str) -> Path:
        """The checkpoint of a stage while it trains."""
        return self.path / f"{stage}.progress.safetensors"

    def borrow(self, other: Path, stages: list[str]) -> None:
        """Copy finished stages and their notes from another run.

        Raises ValueError where they are missing, or made from other data than what is here.
        """
        lender = RunFolder(other, self.device)
        if (other / DATA).exists():
            self.claim_data(read_data(other))
        for stage in stages:
            source = lender.file(stage)
            if source is None:
                raise ValueError(f"{other / stage} is missing: there is no finished stage to reuse")
            if self.file(stage) is None:
                lender.check(stage)
                source = source.parent if source.name == "model.safetensors" else source
                for path in filter(Path.exists, (lender.note_file(stage), source)):
                    remove(self.path / path.relative_to(other))
                    whole_copy(path, self.path / path.relative_to(other))

    # --- notes: what the record says of a stage besides its figures, and the checksums of its files ---

    def note_file(self, stage: str) -> Path:
        return self.path / "notes" / f"{stage.replace('/', '--')}.json"

    def read_note(self, stage: str) -> dict[str, Any]:
        """Raises ValueError where it is damaged."""
        file = self.note_file(stage)
        lost = f"delete it, and the record will lack minutes and losses of {stage}"
        note = read_checked(file, NOTE, lost, has="minutes") if file.exists() else {}
        if self.note_file(note.get("stage", stage)) != file:
            raise ValueError(f"{file} is damaged: it is the note of {note['stage']}; {lost}")
        return note

    def notes(self) -> dict[str, dict[str, Any]]:
        stages = (file.stem for file in sorted((self.path / "notes").glob("*.json")))
        return {stage: self.read_note(stage) for stage in stages}

    def note(self, stage: str, **what: Any) -> None:
        write_checked(self.note_file(stage), {**self.read_note(stage), "stage": stage, **what})

    def note_too(self, stage: str, **what: str) -> None:
        """Beside what is there, where the stage goes on from what it had then."""
        parts = self.path / f"{stage}.parts"
        goes_on = self.checkpoint(stage).exists() or parts.exists()
        there = self.read_note(stage) if goes_on else {}
        self.note(stage, **{key: joined([*there.get(key, "").split("; "), value])
                            for key, value in what.items()})

    @contextmanager
    def timed(self, stage: str, **how: str):
        """Add the time spent inside to the stage's minutes, even when interrupted. A kill loses its time."""
        before, start = self.read_note(stage).get("minutes", 0.0), time.monotonic()
        self.note(stage, minutes=before)
        self.note_too(stage, hardware=hardware(self.device), commit=commit(), **how)
        try:
            yield
        finally:
            self.note(stage, minutes=before + (time.monotonic() - start) / 60)


def minutes_noted(folders: list[RunFolder]) -> float:
    """Of all their stages together."""
    return sum(note.get("minutes", 0.0) for folder in folders for note in folder.notes().values())


@contextmanager
def wall_time(out: Path, folders: list[RunFolder]) -> Iterator[None]:
    """Add to wall.json the minutes spent inside, and those of the stages, even when interrupted."""
    (before, covered), start, first = read_wall(out / "wall.json"), time.monotonic(), minutes_noted(folders)
    try:
        yield
    finally:
        covered += minutes_noted(folders) - first
        minutes = before + (time.monotonic() - start) / 60
        write_checked(out / "wall.json", {"minutes": minutes, "covered": covered})


def read_wall(file: Path) -> tuple[float, float]:
    """Minutes, and those of the stages that they were spent on. Raises ValueError where it is damaged."""
    if not file.exists():
        return 0.0, 0.0
    old = read_json(file, advice=(advice := "delete it to count from zero"))
    if is_number(old):
        return old, old
    found = read_checked(file, NOTE | {"covered": NUMBER}, advice, has="minutes")
    return found["minutes"], found.get("covered", found["minutes"])


def borrow_same(folder: RunFolder, other: Path, settings: Any, seed: int,
                depends_on: Callable[[Any], dict[str, dict[str, Any]]]) -> None:
    """Copy the finished stages of another run whose settings, as far as `depends_on` names them, agree.

    Says which are to be made anew. Raises ValueError where the first stage is missing, has other settings or
    another seed, or is already here and another one: the other stages depend on it. Where it is here and that
    run is gone, this one goes on.
    """
    file, first = other / "settings.json", next(iter(depends_on(settings)))
    if not file.exists():
        if folder.file(first):
            return print(f"{other} is gone: what is finished here stays, the rest is made here")
        raise ValueError(f"{other} is no run folder: it has no settings.json")
    known = {field.name for field in dataclasses.fields(settings)}
    found = read_checked(file, {}, "choose another run folder")
    kinds = [kind.__name__ for kind in type(settings).__mro__]
    if found.get("seed") not in (None, seed):
        raise ValueError(f"{other} cannot be reused, it holds seed {found['seed']}, not {seed}")
    if found.get("kind", kinds[0]) not in kinds:
        raise ValueError(f"{other} cannot be reused, it holds a run of another task")
    there = type(settings)(**{key: value for key, value in found.items() if key in known})
    here, there, lender = depends_on(settings), depends_on(there), RunFolder(other, folder.device)
    if folder.file(first) and folder.read_note(first).get("files") != lender.read_note(first).get("files"):
        raise ValueError(f"{folder.path} has a {first} of its own, so that of {other} cannot be reused; "
                         f"{OTHER_OUT}")
    for stage, values in here.items():
        different = ", ".join(f"{key} {there[stage][key]!r} there, {value!r} here"
                              for key, value in values.items() if there[stage][key] != value)
        if different and stage == first:
            raise ValueError(f"{other} cannot be reused, its {first} has other settings: {different}")
        finished = lender.file(stage)
        if different and finished:
            print(f"{stage} is made anew: {different}")
        elif finished or stage == first:
            folder.borrow(other, [stage])


def read_data(folder: Path) -> dict[str, str]:
    """Data file → its hash when the run in this folder began. Raises ValueError where that is damaged."""
    advice = "delete it, and data are not compared"
    return read_checked(folder / DATA, {"files": dict}, advice, has="files")["files"]


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def whole_copy(source: Path, target: Path) -> None:
    """Copy a file or folder, unless it is there. The renaming comes last: a kill leaves no half model."""
    if target.exists():
        return
    half = target.with_name(f".{target.name}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    remove(half)
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, half)
    half.rename(target)
