"""What every experiment shares: settings that explain themselves, a run folder that resumes, and the result record."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterable

import torch
from torch import nn

from ..hf import checkpoint
from ..runtime.device import hardware
from ..runtime.files import atomic_json
from ..tokenizer import TextTokenizer

ROOT = Path(__file__).resolve().parent.parent.parent


def option(default: Any, help: str, choices: Iterable[str] | None = None, free: bool = False) -> Any:
    """A settings field whose explanation becomes its line in --help; `free`: a rerun in the same folder may change it."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "free": free})


class RunFolder:
    """The folder of one run: finished stages are loaded from it, an interrupted one goes on from its checkpoint."""

    def __init__(self, path: Path, settings: Any, device: torch.device):
        self.path, self.hardware = Path(path), hardware(device)
        self.claim({field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)
                    if not field.metadata["free"]})

    def claim(self, settings: dict[str, Any]) -> None:
        """Write settings.json, or check that it is the same, once a stage has left something that depends on it.

        Raises ValueError for other settings or an unwritable folder.
        """
        file = self.path / "settings.json"
        if file.exists() and any(path != file for path in self.path.iterdir()):
            old = read_json(file)
            new = json.loads(json.dumps(settings))
            different = [f"{k} (there {old.get(k)!r}, now {new.get(k)!r})" for k in {**old, **new} if old.get(k) != new.get(k)]
            if different:
                raise ValueError(f"{self.path} holds a run with other settings: {', '.join(different)}; "
                                 "choose another folder with --out, or delete this one")
        else:
            try:
                atomic_json(file, settings)
            except OSError as error:
                raise ValueError(f"cannot write to {self.path}: {error.strerror}") from None

    def notes(self, file: str) -> dict[str, Any]:
        path = self.path / f"{file}.json"
        return read_json(path) if path.exists() else {}

    def note(self, file: str, key: str, value: Any) -> None:
        atomic_json(self.path / f"{file}.json", {**self.notes(file), key: value})

    @contextmanager
    def timed(self, stage: str):
        """Add the time spent inside to the stage's minutes, also when it is interrupted; a kill loses the time of its stage."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.note("minutes", stage, self.notes("minutes").get(stage, 0.0) + (time.monotonic() - start) / 60)
            self.note("hardware", stage, self.hardware)

    def borrow(self, other: Path, names: list[str]) -> None:
        """Copy finished stages from another run. Raises ValueError where they are not there."""
        for name in names:
            source, target = other / name, self.path / name
            if not source.exists():
                raise ValueError(f"{source} is missing: there is no finished stage to reuse")
            if not target.exists():  # renamed when it is whole: a kill leaves no half of a model
                half = target.with_name(f".{name}.tmp")
                shutil.rmtree(half, ignore_errors=True)
                (shutil.copytree if source.is_dir() else shutil.copyfile)(source, half)
                half.rename(target)

    def model(self, stage: str, make: Callable[[Path], nn.Module], tokenizer: TextTokenizer, device: torch.device) -> nn.Module:
        """The model of a finished stage, or make(checkpoint path) now and keep it."""
        folder, progress = self.path / stage, self.path / f"{stage}.progress.safetensors"
        if not (folder / "model.safetensors").exists():
            with self.timed(stage):
                checkpoint.save(make(progress), tokenizer, folder)
        progress.unlink(missing_ok=True)
        return checkpoint.load(folder, device)[0]

    def value(self, stage: str, make: Callable[[], Any]) -> Any:
        """The JSON value of a finished stage, or make() now and keep it."""
        file = self.path / f"{stage}.json"
        if not file.exists():
            with self.timed(stage):
                atomic_json(file, make())
        return read_json(file)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text at all
        raise ValueError(f"{path} is damaged ({error}); delete it to run this stage anew") from None


def seed_folder(out: Path, seed: int) -> Path:
    """Seed 0 has the run folder itself, the others folders inside it."""
    return out if seed == 0 else out / f"seed-{seed}"


def seed_folders(settings: Any, seeds: list[int], out: Path, device: torch.device) -> list[RunFolder]:
    """Show the settings, and open a run folder for each seed."""
    shown = dataclasses.asdict(settings).items()
    print("\n".join(["Settings", *(f"  {name:20} {value}" for name, value in shown)]))
    return [RunFolder(seed_folder(out, seed), settings, device) for seed in seeds]


def commit() -> str:
    """The commit of the code, with + where files differ from it; empty outside a git checkout."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--", "minicd", "train.py", "data")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except OSError:
        return ""


COMMIT = commit()  # when the program started: the files may change while it runs


def command_line() -> str:
    """The command that runs this program from the repository's root."""
    program = Path(sys.argv[0]).resolve()
    program = program.relative_to(ROOT) if program.is_relative_to(ROOT) else Path(program.name)
    name = [str(program)] if len(program.parts) == 1 else ["-m", ".".join(program.with_suffix("").parts)]
    return " ".join(["python", *map(shlex.quote, [*name, *sys.argv[1:]])])


def spread(values: list[float]) -> dict[str, Any]:
    """Values of several seeds with mean and sample standard deviation."""
    values = [round(v, 2) for v in values]
    return {"values": values, "mean": round(statistics.mean(values), 2),
            "std": round(statistics.stdev(values), 2) if len(values) > 1 else None}


def record(task: str, scale: str, seeds: list[int], settings: Any, folders: list[RunFolder], metrics: dict[str, list[float]],
           **more: Any) -> dict[str, Any]:
    """What runs report: command, commit, hardware, minutes by stage and seed, metrics by seed with their spread."""
    minutes = [folder.notes("minutes") for folder in folders]
    by_stage = {stage: [round(m.get(stage, 0.0), 2) for m in minutes] for stage in dict.fromkeys(s for m in minutes for s in m)}
    machines = dict.fromkeys(machine for folder in folders for machine in folder.notes("hardware").values())
    return {"task": task, "scale": scale, "command": command_line(), "commit": COMMIT, "hardware": "; ".join(machines),
            "torch": torch.__version__, "seeds": seeds,
            "minutes": {"total": [round(sum(m.values()), 2) for m in minutes], **by_stage},
            "settings": dataclasses.asdict(settings), "metrics": {k: spread(v) for k, v in metrics.items()}, **more}


def write_record(result: dict[str, Any], out: Path, publish: bool) -> None:
    """Into the run folder, and into results/ where that is asked for."""
    atomic_json(out / "record.json", result)
    if publish:
        atomic_json(ROOT / "results" / f"{result['task']}-{result['scale']}.json", result)
