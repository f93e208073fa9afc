"""Evaluate a checkpoint on unseen inputs, ask it one question, or rebuild the tables from results/."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.tables import TABLES
from minicd.hf.checkpoint import load
from minicd.runtime.device import pick_device
from minicd.runtime.progress import printable
from minicd.tasks.report import rebuild
from minicd.tasks.run import Experiment
from minicd.tasks.settings import as_in_run, beside, command_line, guarded, option, settings_from
from train import TASKS


@dataclass
class Flags:
    """What every evaluation has, whatever the experiment."""

    task: str = option("addition", f"the experiment: {', '.join(TASKS)}; with --help, its settings too")
    model: str = option("", "folder (or hub id) of the checkpoint; to --ask, a run folder for all students")
    ask: str | None = option(None, 'answer one question, for example "31415926 + 27182818", or a prompt; '
                             "the base of the run answers, too")
    device: str = option("auto", "cpu, cuda, or auto: cuda where there is one")
    report: bool = option(False, "rebuild results/README.md and the tables of README.md from results/*.json")


def main() -> None:
    arguments, flags, task = command_line(__doc__, Flags, TASKS, lambda kind: (kind.Eval, {}))
    if flags.report:
        rebuild(Path(__file__).parent, TASKS, TABLES)
        print("rebuilt: README.md and results/README.md")
        return
    if not flags.model:
        raise ValueError("--model is missing: the folder of a checkpoint, for example runs/addition/student")
    settings, device = settings_from(arguments, task.Eval), pick_device(flags.device)
    if flags.ask is not None:
        ask(task, flags, settings, device)
        return
    settings = as_in_run(settings, run_of(Path(flags.model)))
    model, tokenizer = load(beside(flags.model), device)
    print(printable(task.examine(model, tokenizer, settings, Path(flags.model))))


def ask(task: type[Experiment], flags: Flags, settings: Any, device: torch.device) -> None:
    """The answers of a model, or of all students in a run folder, and of the base that they come from."""
    run, models = answering(flags.model)
    settings = as_in_run(settings, run)
    for name, folder in models.items():
        model, tokenizer = load(folder, device)
        answer = printable(task.ask(model, tokenizer, flags.ask, settings))
        print(answer if len(models) == 1 else f"{name:{max(map(len, models))}}  {answer}")


def answering(model: str) -> tuple[Path, dict[str, str]]:
    """The run folder of what --model names, and by its name the folder of each model that answers."""
    folder = Path(beside(model))
    run = run_of(folder)
    whole = folder in (run, run.parent)
    students = finished_students(folder) if whole else [folder]
    if not students:
        raise ValueError(f"{folder} has no finished student to ask")
    found = {str(student.relative_to(folder)) if whole else model: str(student) for student in students}
    base = as_in_run(OfRun(), run).model
    return run, found | ({} if base is None else {f"its base, {base}": beside(base)})


def finished_students(run: Path) -> list[Path]:
    """The folders of a run's students, without those that are half written."""
    places = [file.parent for file in run.rglob("model.safetensors")]
    return sorted(place for place in places if place.name.startswith("student")
                  and not any(part.startswith(".") for part in place.relative_to(run).parts))


def run_of(folder: Path) -> Path:
    """The run folder in which a model is. Where a folder has only seeds other than 0, that of one of them."""
    files = (file for place in [folder, *folder.parents[:3]]
             for file in [place / "settings.json", *sorted(place.glob("seed-*/settings.json"))])
    return next((file.parent for file in files if file.exists()), folder.parent)


@dataclass
class OfRun:
    """What a run's settings say of its models."""

    model: str | None = option(None, "the base")


if __name__ == "__main__":
    guarded(main)
