"""Result records (results/*.json): what ran where, by which command, on which commit, with which figures."""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
import subprocess
import sys
from collections import Counter
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import torch

from ..runtime.files import read_json

ROOT = Path(__file__).resolve().parents[2]
DIGITS = 4  # of figures whose means are shown with one or two: rounding twice would move some


@cache
def commit() -> str:
    """The commit of the code, with + where files differ from it; empty outside a git checkout.

    A program asks for it once, at its start: the files may change while it runs.
    """
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--", "minicd", "train.py", "eval.py", "bench", "data")
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
    """Values of several seeds with mean and sample standard deviation, to more digits than a table shows."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"values": [round(v, DIGITS) for v in values], "mean": round(statistics.mean(values), DIGITS),
            "std": std if std is None else round(std, DIGITS)}


def mean_of(values: Sequence[Any]) -> Any:
    """The mean over the seeds, entry by entry in lists and dictionaries. A seed may lack a key."""
    if isinstance(values[0], dict):
        return by_key(values, mean_of)
    if isinstance(values[0], (list, tuple)):
        return [mean_of(entries) for entries in zip(*values)]
    return round(statistics.mean(values), DIGITS)


def by_key(seeds: Sequence[dict[str, Any]], sum_up: Callable[[list], Any]) -> dict[str, Any]:
    """Key → `sum_up` of its values in the seeds that have it."""
    keys = dict.fromkeys(key for seed in seeds for key in seed)
    return {key: sum_up([seed[key] for seed in seeds if key in seed]) for key in keys}


def hashes(files: list[Path]) -> dict[str, str]:
    """The sha256 of each file by its name; of namesakes by their paths."""
    files = list(dict.fromkeys(files))
    names = Counter(file.name for file in files)
    return {file.name if names[file.name] == 1 else str(file): sha256(file.read_bytes()).hexdigest()
            for file in files}


def fingerprints(base: Path, ends: int = 2**20) -> dict[str, str]:
    """Of a model's files, which may be made anew in their place: the sha256 of size, first and last bytes.

    Other weights differ there, too. Empty for a model that is no folder.
    """
    found = {}
    for path in sorted(base.glob("*")) if base.name and base.is_dir() else ():
        if path.suffix in (".safetensors", ".bin", ".json"):
            size = path.stat().st_size
            with open(path, "rb") as file:
                first = file.read(ends)
                file.seek(max(0, size - ends))
                found[f"{base.name}/{path.name}"] = sha256(b"%d " % size + first + file.read()).hexdigest()
    return found


def make_record(task: str, settings: Any, seeds: list[int], figures: list[dict[str, Any]],
                notes: list[dict[str, dict]], paper: dict[str, Any],
                earlier: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Figures and notes of every seed → the JSON record, with spreads of `metrics` and means of the rest.

    `earlier`: runs of a record that this one joins; of two runs with the same seed the new one counts.
    """
    how = {"command": command_line(), "commit": commit(), "torch": torch.__version__}
    runs = [{"seed": seed, **how, "figures": f, "notes": {stage: brief(note[stage]) for stage in note}}
            for seed, f, note in zip(seeds, figures, notes)]
    if earlier:  # keys as JSON has them
        kept = [run for run in earlier if run["seed"] not in seeds]
        runs = sorted([*kept, *json.loads(json.dumps(runs))], key=lambda run: run["seed"])
    return {"task": task, "scale": settings.scale, "settings": dataclasses.asdict(settings),
            **sum_up(runs), "paper": paper, "runs": runs}


def brief(note: dict[str, Any]) -> dict[str, Any]:
    """A stage's note without the files of the run folder, and of its losses the last one."""
    kept = {key: note[key] for key in ("minutes", "commit", "hardware", "precision") if key in note}
    return kept | ({"final_loss": round(note["losses"][-1], 5)} if note.get("losses") else {})


def sum_up(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a record says of all its runs together."""
    figures, notes = [run["figures"] for run in runs], [run["notes"] for run in runs]
    stages = list(dict.fromkeys(stage for note in notes for stage in note if "minutes" in note[stage]))
    minutes = {s: [round(note.get(s, {}).get("minutes", 0.0), 2) for note in notes] for s in stages}
    total = [round(sum(stage.get("minutes", 0.0) for stage in note.values()), 2) for note in notes]
    losses = {s: [note[s]["final_loss"] for note in notes if "final_loss" in note.get(s, {})] for s in stages}
    parts = [stage for note in notes for stage in note.values()]
    made_by = {stage: {key: distinct([note[stage] for note in notes if stage in note], key)
                       for key in ("commit", "precision")} for stage in stages}
    return {**{key: distinct(runs, key) for key in ("command", "commit", "torch")},
            "commits": distinct(parts, "commit"), "hardware": distinct(parts, "hardware"),
            "precision": distinct(parts, "precision"), "stages": made_by,
            "seeds": [run["seed"] for run in runs], "minutes": {"total": total, **minutes},
            "metrics": by_key([f["metrics"] for f in figures], spread),
            **{key: value for key, value in by_key(figures, mean_of).items() if key != "metrics"},
            "final_losses": {stage: values for stage, values in losses.items() if values}}


def distinct(notes: Sequence[dict[str, Any]], key: str) -> str:
    return joined(part for note in notes if key in note for part in str(note[key]).split("; "))


def joined(values: Iterable[str]) -> str:
    """Each once, in their order."""
    return "; ".join(dict.fromkeys(filter(None, values)))


def runs_to_join(path: Path, made_from: dict[str, Any],
                 changes: Callable[[dict], list[str]]) -> list[dict]:
    """The runs of a published record, for more seeds to join. Raises ValueError where they cannot.

    `made_from`: the hashes of the data files of the new seeds, of their base, and of their loss, which older
    records lack. `changes`: the record's settings → how the new ones differ.
    """
    record = read_json(path) if path.exists() else {}
    if not record:
        return []
    if "runs" not in record:
        raise ValueError(f"{path} does not keep its runs apart: no seed can join it")
    other = {"files": "other data files", "base": "another base", "loss_source": "another loss"}
    for name, what in other.items():
        if record.get(name, {} if name == "files" else made_from[name]) != made_from[name]:
            raise ValueError(f"{path} was made from {what}: no seed can join it")
    if different := changes(record["settings"]):
        raise ValueError(f"{path} is of other settings: {', '.join(different)}")
    return record["runs"]
