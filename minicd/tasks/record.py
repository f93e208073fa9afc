"""Result records (results/*.json): what ran where, by which command, on which commit, with which figures."""

from __future__ import annotations

import dataclasses
import shlex
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, Sequence

import torch

ROOT = Path(__file__).resolve().parents[2]


@cache
def commit() -> str:
    """The commit of the code, with + where files differ from it; empty outside a git checkout.

    A program asks for it once, at its start: the files may change while it runs.
    """
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--", "minicd", "train.py", "data")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except OSError:
        return ""


def command_line() -> str:
    """The command that runs this program from the repository's root."""
    program = Path(sys.argv[0]).resolve()
    program = program.relative_to(ROOT) if program.is_relative_to(ROOT) else Path(program.name)
    name = [str(program)] if len(program.parts) == 1 else ["-m", ".".join(program.with_suffix("").parts)]
    return " ".join(["python", *map(shlex.quote, [*name, *sys.argv[1:]])])


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Values of several seeds with mean and sample standard deviation."""
    values = [round(v, 2) for v in values]
    return {"values": values, "mean": round(statistics.mean(values), 2),
            "std": round(statistics.stdev(values), 2) if len(values) > 1 else None}


def mean_of(values: Sequence[Any]) -> Any:
    """The mean over the seeds, entry by entry in lists and dictionaries. A seed may lack a key."""
    if isinstance(values[0], dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: mean_of([value[key] for value in values if key in value]) for key in keys}
    if isinstance(values[0], (list, tuple)):
        return [mean_of(entries) for entries in zip(*values)]
    return round(statistics.mean(values), 2)


def make_record(task: str, settings: Any, seeds: list[int], figures: list[dict[str, Any]],
                notes: list[dict[str, dict]], paper: dict[str, Any]) -> dict[str, Any]:
    """Figures and notes of every seed → the JSON record, with spreads of `metrics` and means of the rest."""
    stages = list(dict.fromkeys(stage for note in notes for stage in note if "minutes" in note[stage]))
    minutes = {s: [round(note.get(s, {}).get("minutes", 0.0), 2) for note in notes] for s in stages}
    total = [round(sum(stage.get("minutes", 0.0) for stage in note.values()), 2) for note in notes]
    losses = {s: [round(note[s]["losses"][-1], 5) for note in notes if "losses" in note.get(s, {})]
              for s in stages}

    def distinct(key: str) -> str:
        found = (str(stage[key]) for note in notes for stage in note.values() if key in stage)
        return "; ".join(dict.fromkeys(found))

    def made_by(stage: str) -> dict[str, str]:
        found = [note[stage] for note in notes if stage in note]
        return {key: "; ".join(dict.fromkeys(str(made[key]) for made in found if key in made))
                for key in ("commit", "precision")}
    return {"task": task, "scale": settings.scale, "command": command_line(), "commit": commit(),
            "commits": distinct("commit"), "hardware": distinct("hardware"), "torch": torch.__version__,
            "precision": distinct("precision"), "stages": {stage: made_by(stage) for stage in stages},
            "seeds": seeds, "minutes": {"total": total, **minutes},
            "settings": dataclasses.asdict(settings),
            "metrics": {key: spread([f["metrics"][key] for f in figures]) for key in figures[0]["metrics"]},
            **{key: mean_of([f[key] for f in figures]) for key in figures[0] if key != "metrics"},
            "final_losses": {stage: values for stage, values in losses.items() if values}, "paper": paper}
