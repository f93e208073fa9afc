"""Damage on purpose: kills, damaged files, full disks and odd flags. What does minicd do with each?

    python -m bench.damage   # from the repository's root; about ten minutes on two CPU cores

Very small runs of every task are made once. Each trial takes a run as it was at some moment, does something
to it, and gives the same command again. It must be refused in one sentence, or give the same files bit for
bit; where the sentence says what to delete, that must mend it. Faults are printed with the trial's number.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any, Callable
from unittest.mock import patch

import numpy as np
import torch

import train
from bench.accidents import SHAPES, damage
from bench.common import ROOT, Parser, count, guarded, publish, seed_number
from bench.tables import FAULTS
from bench.trials import REFUSED, SAME, SMALL, VALID, Said, Sound, Trial, ask, command, make_sound
from minicd.hf.checkpoint import load
from minicd.runtime import files
from minicd.tasks.parts.natural_instructions import load_task
from minicd.tasks.settings import flag, type_name

# (place of all folders, sound runs by task, dice) → what came of the trial
Kind = Callable[[Path, dict[str, Sound], random.Random], Said]


def some_state(place: Path, sounds: dict[str, Sound], dice: random.Random) -> Trial:
    """A run as it was at some moment, or finished but for some stages, so that others are read again."""
    sound = dice.choice(list(sounds.values()))
    if dice.random() < 0.5:
        return Trial(sound, dice.choice(sound.states), place / "trial")
    trial = Trial(sound, sound.finished, place / "trial")
    for stage in dice.sample(list(trial.made), dice.choice([1, 2, 4])):
        trial.drop(stage)
    return trial


def damaged_run(place: Path, sounds: dict[str, Sound], dice: random.Random) -> Said:
    trial = some_state(place, sounds, dice)
    paths = [path for path in sorted(trial.out.rglob("*")) if path.is_file()]
    return trial.verdict(damage(dice.choice(paths), paths, dice))


def interrupted(place: Path, sounds: dict[str, Sound], dice: random.Random) -> Said:
    """Ctrl-C at any write."""
    return stopped(some_state(place, sounds, dice), KeyboardInterrupt(), "stopped; the same command", dice)


def full_disk(place: Path, sounds: dict[str, Sound], dice: random.Random) -> Said:
    error = OSError(errno.ENOSPC, "No space left on device")
    return stopped(some_state(place, sounds, dice), error, "No space left on device", dice)


def stopped(trial: Trial, error: BaseException, sentence: str, dice: random.Random) -> Said:
    """From some write on every write fails; then the same command again, without that."""
    left, fsync = [dice.randrange(30)], os.fsync

    def fail(number: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise error
        fsync(number)
    with patch.object(files.os, "fsync", fail):
        first = command([*trial.sound.words, "--out", str(trial.out)])
    if first.verdict in FAULTS or (first.verdict == REFUSED and sentence not in first.words):
        return Said("traceback" if first.verdict == REFUSED else first.verdict, first.words)
    again = trial.verdict([])
    return Said("lost", again.words) if again.verdict == REFUSED else Said(first.verdict, first.words) if (
        again.verdict == SAME) else again


def killed(place: Path, sounds: dict[str, Sound], dice: random.Random) -> Said:
    """kill -9 of the whole program, with helpers or without, at a random moment; then the command again."""
    sound = dice.choice(list(sounds.values()))
    trial = Trial(sound, dice.choice([*sound.states[:1], dice.choice(sound.states)]), place / "trial")
    words = [*sound.words, "--jobs", str(dice.choice([1, 2])), "--out", str(trial.out)]
    process = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(dice.uniform(2.0, 7.0))
    process.kill(), process.wait()
    time.sleep(0.5)  # for its helpers to notice
    again = trial.verdict([])
    return Said("lost", again.words) if again.verdict == REFUSED else again


def damaged_model(place: Path, sounds: dict[str, Sound], dice: random.Random) -> Said:
    """A file of a folder with a model. A changed config or tokenizer may be another valid one."""
    source, folder = place / dice.choice(["lists", "world"]), place / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    paths = sorted(folder.iterdir())
    changed, loaded = damage(dice.choice(paths), paths, dice), []
    said = ask(lambda: loaded.append(load(folder)))
    if said.verdict != SAME:
        return said if str(folder) in said.words else Said("traceback", said.words)
    (model, tokenizer), (old, old_tokenizer) = loaded[0], load(source)
    pairs = zip(model.state_dict().values(), old.state_dict().values(), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        return Said("silent", f"other weights after damage to {changed}")
    unchanged = model.config == old.config and tokenizer.backend.to_str() == old_tokenizer.backend.to_str()
    return said if unchanged else Said(VALID)


def damaged_task(place: Path, sounds: dict[str, Sound], dice: random.Random) -> Said:
    """A task file, which has no checksum: another valid one is read as it stands."""
    shutil.rmtree(place / "damaged", ignore_errors=True)
    shutil.copytree(place / "tasks", place / "damaged")
    paths = sorted((place / "damaged").iterdir())
    path, found = dice.choice(paths), []
    damage(path, paths, dice) if dice.random() < 0.8 else path.write_text(dice.choice(SHAPES))
    said = ask(lambda: found.append(load_task(path)))
    if said.verdict == REFUSED and str(path) not in said.words:
        said.verdict = "traceback"
    return said if said.verdict != SAME or found[0] == load_task(place / "tasks" / path.name) else Said(VALID)


def odd_flag(place: Path, sounds: dict[str, Sound], dice: random.Random) -> Said:
    """A value that nobody means. Where it is accepted, the run must be one that ends with finite figures."""
    task = dice.choice(list(sounds))
    option = dice.choice([field for field in [*fields(train.TASKS[task].Settings), *fields(train.Flags)]
                          if type_name(field) != "bool" and field.name != "task"])
    numbers = ["nan", "inf", "-inf", "-1", "0", "1e-9", "2", "1.5", str(10**15), "-0", "1e3", "0x10", "", "x",
               "9" * 400]
    texts = ["", "x", "/etc/passwd", "/dev/null", "task501,task501", ",", "\x1b[31m", "é" * 300, "cuda",
             "meta", str(place / "nowhere" / ".." / "nowhere")]
    value, out = dice.choice(texts if type_name(option) == "str" else numbers), place / "trial"
    shutil.rmtree(out, ignore_errors=True)
    with contextlib.chdir(place):  # of which a value may be a file's name
        said = command([*sounds[task].words, "--out", str(out), flag(option), value])
    if said.verdict != SAME or not (out / "record.json").exists():
        return said
    figures = json.loads((out / "record.json").read_text())["metrics"].values()
    finite = all(np.isfinite(figure["mean"]) for figure in figures)
    return said if finite else Said("silent", f"{flag(option)} {value}")


KINDS: dict[str, tuple[int, str, Kind]] = {
    "damaged run": (450, "a file of a run folder, at any moment of the run", damaged_run),
    "damaged model": (200, "a file of a model's folder", damaged_model),
    "damaged task": (100, "a task file", damaged_task),
    "odd flag": (190, "an odd value of a flag", odd_flag),
    "interrupted": (60, "Ctrl-C at a write", interrupted),
    "full disk": (60, "no space left from some write on", full_disk),
    "killed": (30, "kill -9 of the program", killed)}


def campaign(place: Path, trials: dict[str, int], seed: int) -> list[dict[str, Any]]:
    """Make the sound runs, then so many trials of each kind → a row of counts for each."""
    torch.set_num_threads(1)
    sounds, rows = {task: make_sound(task, place) for task in SMALL}, []
    for kind, n in trials.items():
        counts = Counter()
        for number in range(n):
            dice = random.Random(f"{seed} {kind} {number}")
            said = KINDS[kind][2](place, sounds, dice)
            counts[said.verdict] += 1
            if said.verdict in FAULTS:
                print(f"{kind} {number}: {said.verdict}: {said.words}", flush=True)
        rows.append({"kind": kind, "what": KINDS[kind][1], "trials": n,
                     **{name: counts[name] for name in (REFUSED, SAME, VALID, *FAULTS)}})
        print(rows[-1], flush=True)
    return rows


def parse() -> Any:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="only these")
    parser.add_argument("--trials", type=count, help="of each kind (default: more of the cheap ones)")
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench-damage.json", help="the record")
    return parser.parse_args()


def main() -> None:
    arguments, words = parse(), sys.argv
    with tempfile.TemporaryDirectory() as place:
        trials = {kind: arguments.trials or KINDS[kind][0] for kind in arguments.kinds}
        rows = campaign(Path(place), trials, arguments.seed)
    sys.argv = words  # which stand in the record
    publish(arguments.out, torch.device("cpu"), {"seed": arguments.seed}, rows)
    if faults := sum(row[name] for row in rows for name in FAULTS):
        raise ValueError(f"{faults} trials ended in a fault")


if __name__ == "__main__":
    guarded(main)
