"""Damage on purpose: kills, damaged files, full disks and odd flags. What does minicd do with each?

    python -m bench.damage   # from the repository's root; about 20 minutes on two CPU cores

Very small runs of every task are made once. Each trial takes a run as it was at some moment, does something
to it, and gives the same command again. It must be refused in one sentence, or give the same files bit for
bit; where the sentence says what to delete, that must mend it. Faults are printed with the trial's number.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import torch

import train
from bench.common import ROOT, Parser, count, guarded, publish, seed_number
from bench.tables import FAULTS
from data.world.instructions import world_tokenizer
from data.world.lists import pocket_tokenizer
from minicd.hf.checkpoint import load, save
from minicd.labels import Examples
from minicd.runtime import files
from minicd.t5 import T5, T5Config, initialise
from minicd.tasks import addition, addition_questions
from minicd.tasks.natural_instructions import load_task
from minicd.tasks.settings import flag, type_name
from minicd.training import Epochs, FitSettings, fit

REFUSED, SAME, VALID = "refused", "same", "another valid file"
PATIENCE = 120  # seconds; a trial takes one or two
COMMON = ["--device", "cpu", "--jobs", "1", "--precision", "fp32", "--save-every", "0"]
SHARED = ["--practice-inputs", "24", "--epochs", "4", "--batch-size", "4", "--label-samples", "5",
          "--test-instances", "3", "--max-new-tokens", "4"]
SMALL = {
    "addition": ["--max-digits", "3", "--train-questions", "16", "--teacher-epochs", "6", "--teacher-batch", "4",
                 "--direct-epochs", "6", "--practice-questions", "60", "--label-samples", "5", "--floor", "0",
                 "--student-epochs", "4", "--student-batch", "8", "--test-questions", "20", "--optimiser", "adamw"],
    "instructions": [*SHARED, "--tasks", "2"], "explanations": [*SHARED, "--tasks", "3"], "task_ids": SHARED}
POCKET_TASKS = ROOT / "data" / "instructions" / "test"


# --- what can happen to bytes ---


def flipped(data: bytes, a: int, b: int, dice: random.Random) -> bytes:
    return data[:a] + bytes([data[a] ^ 1 << dice.randrange(8)]) + data[a + 1 :]


def swapped(data: bytes, a: int, b: int, dice: random.Random) -> bytes:
    size = min(b - a, len(data) - b)
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


ACCIDENTS: dict[str, Callable[[bytes, int, int, random.Random], bytes]] = {
    "flipped": flipped, "swapped": swapped,
    "cut off": lambda data, a, b, dice: data[:a],
    "cut out": lambda data, a, b, dice: data[:a] + data[b:],
    "put in": lambda data, a, b, dice: data[:a] + dice.randbytes(dice.choice([1, 8, 100])) + data[a:],
    "doubled": lambda data, a, b, dice: data[:b] + data[a:],
    "zeroed": lambda data, a, b, dice: data[:a] + bytes(b - a) + data[b:],
    "overwritten": lambda data, a, b, dice: data[:a] + dice.randbytes(b - a) + data[b:]}
SHAPES = ["{}", "[]", "[1]", "3", "null", '"text"', '{"minutes": "long", "accuracy": []}', "[[[", ""]


def accident(kind: str, data: bytes, start: int, end: int, dice: random.Random) -> bytes:
    """Something happens to the bytes between start and end: to a few of them, or to many."""
    a = dice.randrange(start, end)
    b = min(end, a + dice.choice([1, 4, 64, 1000]))
    return ACCIDENTS[kind](data, a, b, dice)


def damage(path: Path, others: list[Path], dice: random.Random) -> list[Path]:
    """Do something to a file, perhaps with another of its kind. Returns what was touched."""
    data, touched = path.read_bytes(), [path]
    how = dice.choice([*ACCIDENTS, "flipped", "flipped", "gone", "shape", "another", "exchanged"])
    others = [other for other in others if other.suffix == path.suffix and other != path]
    if how == "gone":
        path.unlink()
    elif how == "shape" or not data or (how in ("another", "exchanged") and not others):
        path.write_text(dice.choice(SHAPES))
    elif how in ("another", "exchanged"):
        touched.append(other := dice.choice(others))
        path.write_bytes(other.read_bytes())
        if how == "exchanged":
            other.write_bytes(data)
    else:
        path.write_bytes(accident(how, data, 0, len(data), dice))
    return touched


# --- what minicd does ---


@dataclass
class Said:
    """How a command ended: its verdict so far, the sentence or the traceback, and what it printed."""

    verdict: str
    words: str = ""
    printed: str = ""


class Hang(BaseException):
    pass


def ask(work: Callable[[], Any]) -> Said:
    """Do it, with a limit of time: refused in one sentence, done, or a fault."""
    def late(number, frame):
        raise Hang
    signal.signal(signal.SIGALRM, late), signal.alarm(PATIENCE)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            guarded(work)
    except SystemExit as stop:
        said = str(stop.code).strip()
        sentence = isinstance(stop.code, str) and said.isprintable()
        return Said(REFUSED if sentence and len(said) < 3000 else "traceback", said, printed.getvalue())
    except Hang:
        return Said("hang", traceback.format_exc())
    except BaseException:
        return Said("traceback", traceback.format_exc())
    finally:
        signal.alarm(0)
    return Said(SAME, "", printed.getvalue())


def command(words: list[str]) -> Said:
    """`python train.py` with these words, in this process."""
    sys.argv = ["train.py", *words]
    return ask(train.main)


# --- small runs of every task, and their states at all moments ---


@dataclass
class Sound:
    """A task's small run: its command without --out, the finished folder, and copies from on the way."""

    words: list[str]
    finished: Path
    states: list[Path]
    stages: dict[str, list[Path]]


def tiny_model(tokenizer: Any, width: int) -> T5:
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=width // 2, d_ff=48, num_heads=2,
                      num_layers=1, feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0,
                      initializer_factor=2.0 if width == 16 else 1.0)
    return initialise(T5(config), seed=0)


def addition_base(folder: Path) -> None:
    """It has seen enough scratchpads to put digits between two #, so that practice finds answers."""
    model, tokenizer = tiny_model(pocket_tokenizer(), 32), pocket_tokenizer()
    questions = addition_questions.draw_questions(100, 3, "train", np.random.default_rng(9))
    examples = addition.scratchpad_examples(questions, tokenizer, "compact")
    fit(model, Epochs(examples, 20, 40, seed=0), FitSettings(lr=1e-2, decay=0.3, precision="fp32"))
    save(model, tokenizer, folder)


def make_sound(task: str, place: Path) -> Sound:
    """Run the task once, and copy its folder after each file that it writes."""
    base, data = place / ("lists" if task == "addition" else "world"), place / "tasks"
    if not data.exists():
        addition_base(place / "lists")
        save(tiny_model(world_tokenizer(), 16), world_tokenizer(), place / "world")
        data.mkdir()
        for path in sorted(POCKET_TASKS.glob("task50[1-4]*.json")) + sorted(POCKET_TASKS.glob("task51[67]*.json")):
            shutil.copy(path, data)
    words = ["--task", task, *COMMON, *SMALL[task], "--model", str(base)]
    words += [] if task == "addition" else ["--data", str(data)]
    out, states, replace = place / task / "run", [], os.replace

    def then_copy(source: Path, target: Path) -> None:
        replace(source, target)
        if out in Path(target).parents:
            states.append(place / task / f"state-{len(states)}")
            shutil.copytree(out, states[-1])
    with patched(files.os, "replace", then_copy):
        said = command([*words, "--out", str(out)])
    if said.verdict != SAME:
        raise ValueError(f"the small run of {task} failed: {said.words}")
    return Sound(words, out, states, stage_files(out))


@contextlib.contextmanager
def patched(module: Any, name: str, value: Any) -> Iterator[None]:
    old = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, old)


def stage_files(folder: Path) -> dict[str, list[Path]]:
    """Stage → its files' names, of a finished run. What a stage leaves for itself alone is not among them."""
    notes = [json.loads(path.read_text()) for path in sorted((folder / "notes").glob("*.json"))]
    return {note["stage"]: list(map(Path, note["files"])) for note in notes if ".parts" not in note["stage"]}


def result(folder: Path, names: list[Path], without_losses: bool) -> dict[str, Any]:
    """All that a run gives but its times."""
    skipped = ["minutes", "hardware", "command", "commit", "commits", "precision"]
    skipped += ["final_losses"] * without_losses
    record = json.loads((folder / "record.json").read_text())
    return {**{key: value for key, value in record.items() if key not in skipped},
            **{str(name): (folder / name).read_bytes() for name in names if (folder / name).exists()}}


class Trial:
    """A copy of a run in some state, to damage and to run again."""

    def __init__(self, sound: Sound, state: Path, out: Path):
        self.sound, self.out = sound, out
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(state, out)
        self.made = {stage: self.times(stage) for stage, names in sound.stages.items()
                     if all((out / name).exists() for name in names)}  # the finished stages

    def times(self, stage: str) -> list[int]:
        """When its files were written; 0: not there."""
        paths = [self.out / name for name in self.sound.stages[stage]]
        return [path.stat().st_mtime_ns if path.exists() else 0 for path in paths]

    def drop(self, stage: str) -> None:
        for name in self.sound.stages[stage]:
            (self.out / name).unlink()
        del self.made[stage]

    def again(self) -> Said:
        """The same command, and whether its result is that of the sound run."""
        said = command([*self.sound.words, "--out", str(self.out)])
        if said.verdict == SAME:
            lost = re.findall("record lacks minutes and losses of (.*), whose files cannot be", said.printed)
            names = [name for stage, files in self.sound.stages.items() if stage not in lost for name in files]
            ours, theirs = (result(folder, names, bool(lost)) for folder in (self.out, self.sound.finished))
            if different := [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]:
                return Said("silent", f"other than in the sound run: {different}")
        return said

    def verdict(self, changed: list[Path]) -> Said:
        """Run again, and where that is refused, once more after what the sentence advises."""
        first = said = self.again()
        for _ in range(4):
            if said.verdict != REFUSED or "delete this " in said.words:
                break
            path = advised(said.words, self.out)
            if path is None:
                return Said("lost", f"no advice: {said.words}")
            changed += [path, *path.rglob("*")]
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            said = self.again()
        if said.verdict in FAULTS or (said.verdict == REFUSED and said is not first):
            return Said(said.verdict if said.verdict in FAULTS else "lost", f"{first.words}; {said.words}")
        again = [stage for stage, times in self.made.items() if self.times(stage) != times
                 and not any(self.out / name in changed for name in self.sound.stages[stage])]
        return Said("lost", f"made anew: {again}") if again else first


def advised(sentence: str, out: Path) -> Path | None:
    """What the sentence says to delete, if it is there."""
    named = re.search(rf"error: ({re.escape(str(out))}\S+) ", sentence)
    found = re.search(rf"[dD]elete ({re.escape(str(out))}\S*|it)\b", sentence)
    path = found and Path(named[1] if found[1] == "it" else found[1]) if named else None
    return path if path and path.exists() else None


# --- the kinds of trials: (place, sound runs, dice) → what came of it ---

Kind = Callable[[Path, dict[str, Sound], random.Random], Said]


def some_state(place: Path, sounds: dict[str, Sound], dice: random.Random) -> Trial:
    """A task's run as it was at some moment, or finished but for some files, so that others are read again."""
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
    with patched(files.os, "fsync", fail):
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
    equal = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), old.state_dict().values(), strict=True))
    if not equal:
        return Said("silent", f"weights after {changed}")
    unchanged = model.config == old.config and tokenizer.backend.to_str() == old_tokenizer.backend.to_str()
    return said if unchanged else Said(VALID)


def damaged_task(place: Path, sounds: dict[str, Sound], dice: random.Random) -> Said:
    """A task file, which has no checksum: another valid one is read as it stands."""
    paths = sorted((place / "tasks").glob("*.json"))
    path, found = dice.choice(paths), []
    copy = place / "damaged" / path.name
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(path, copy)
    damage(copy, paths, dice) if dice.random() < 0.8 else copy.write_text(dice.choice(SHAPES))
    said = ask(lambda: found.append(load_task(copy)))
    if said.verdict == REFUSED and str(copy) not in said.words:
        said.verdict = "traceback"
    return said if said.verdict != SAME or found[0] == load_task(path) else Said(VALID)


def odd_flag(place: Path, sounds: dict[str, Sound], dice: random.Random) -> Said:
    """A value that nobody means. Where it is accepted, the run must be one that ends with finite figures."""
    task = dice.choice(list(sounds))
    name = dice.choice([field for field in [*fields(train.TASKS[task].Settings), *fields(train.Flags)]
                        if type_name(field) != "bool" and field.name not in ("publish", "task")])
    numbers = ["nan", "inf", "-inf", "-1", "0", "1e-9", "2", "1.5", str(10**15), "-0", "1e3", "0x10", "", "x", "9" * 400]
    texts = ["", "x", "../..", "/etc/passwd", "/dev/null", "task501,task501", ",", "\x1b[31m", "é" * 300, "cuda", "meta"]
    value = dice.choice(texts if type_name(name) == "str" else numbers)
    if value == "../..":  # a folder of somebody
        value = str(place / "nowhere" / ".." / "nowhere")
    out = place / "trial"
    shutil.rmtree(out, ignore_errors=True)
    said = command([*sounds[task].words, "--out", str(out), flag(name), value])
    if said.verdict != SAME or not (out / "record.json").exists():
        return said
    figures = json.loads((out / "record.json").read_text())["metrics"].values()
    return said if all(np.isfinite(figure["mean"]) for figure in figures) else Said("silent", f"{flag(name)} {value}")


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
