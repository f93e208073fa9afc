"""Very small runs of every task, copies of them at any moment, and what comes of running them again."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable
from unittest.mock import patch

import numpy as np
import torch

import train
from bench.common import ROOT, guarded
from bench.tables import FAULTS
from data.world.instructions import world_tokenizer
from data.world.lists import pocket_tokenizer
from minicd.hf.checkpoint import save
from minicd.runtime import files
from minicd.t5 import T5, T5Config, initialise
from minicd.tasks import addition
from minicd.tasks.parts import addition_questions
from minicd.training import Epochs, FitSettings, fit

REFUSED, SAME, VALID = "refused", "same", "another valid file"
PATIENCE = 120  # seconds; a trial takes one or two
COMMON = ["--device", "cpu", "--jobs", "1", "--precision", "fp32", "--save-every", "0"]
SHARED = ["--practice-inputs", "24", "--epochs", "4", "--batch-size", "4", "--label-samples", "5",
          "--test-instances", "3", "--max-new-tokens", "4"]
SMALL = {
    "addition": ["--max-digits", "3", "--train-questions", "16", "--teacher-epochs", "6",
                 "--teacher-batch", "4", "--direct-epochs", "6", "--practice-questions", "60",
                 "--label-samples", "5", "--floor", "0", "--student-epochs", "4", "--student-batch", "8",
                 "--test-questions", "20", "--optimiser", "adamw"],
    "instructions": [*SHARED, "--tasks", "2"], "explanations": [*SHARED, "--tasks", "3"], "task_ids": SHARED}
POCKET_TASKS = ROOT / "data" / "instructions" / "test"


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
                      num_layers=1, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
                      dropout_rate=0.0)
    return initialise(T5(config), seed=0)


def addition_base(folder: Path) -> None:
    """It has seen enough scratchpads to put digits between two #, so that practice finds answers."""
    model, tokenizer = tiny_model(pocket_tokenizer(), 32), pocket_tokenizer()
    questions = addition_questions.draw_questions(100, 3, "train", np.random.default_rng(9))
    examples = addition.scratchpad_examples(questions, tokenizer, "compact")
    fit(model, Epochs(examples, 20, 40, seed=0), FitSettings(lr=1e-2, decay=0.3, precision="fp32"))
    save(model, tokenizer, folder)


def that_stops(model: T5, share: float = 0.2) -> T5:
    """The model, with about this probability of the stop token everywhere, by a constant feature."""
    words, width = model.lm_head.weight.shape
    with torch.no_grad():
        model.shared.weight[:, 0], model.lm_head.weight[:, 0] = 30.0, 0.0
        odds = share / (1 - share) * words
        model.lm_head.weight[model.config.eos_token_id, 0] = math.log(odds) / width**0.5
    return model


def make_sound(task: str, place: Path) -> Sound:
    """Run the task once, and copy its folder after each file that it writes."""
    base, data = place / ("lists" if task == "addition" else "world"), place / "tasks"
    if not data.exists():
        addition_base(place / "lists")
        save(that_stops(tiny_model(world_tokenizer(), 16)), world_tokenizer(), place / "world")
        data.mkdir()
        for name in ("task50[1-4]*.json", "task51[67]*.json"):
            for path in POCKET_TASKS.glob(name):
                shutil.copy(path, data)
    words = ["--task", task, *COMMON, *SMALL[task], "--model", str(base)]
    words += [] if task == "addition" else ["--data", str(data)]
    out, states, replace = place / task / "run", [], os.replace

    def then_copy(source: Path, target: Path) -> None:
        replace(source, target)
        if out in Path(target).parents:
            states.append(place / task / f"state-{len(states)}")
            shutil.copytree(out, states[-1])
    with patch.object(files.os, "replace", then_copy):
        said = command([*words, "--out", str(out)])
    if said.verdict != SAME:
        raise ValueError(f"the small run of {task} failed: {said.words}")
    return Sound(words, out, states, stage_files(out))


def stage_files(folder: Path) -> dict[str, list[Path]]:
    """Stage → its files' names, of a finished run. What a stage leaves for itself alone is not among them."""
    notes = [json.loads(path.read_text()) for path in sorted((folder / "notes").glob("*.json"))]
    return {note["stage"]: list(map(Path, note["files"])) for note in notes if ".parts" not in note["stage"]}


def result(folder: Path, names: list[Path], without_losses: bool) -> dict[str, Any]:
    """All that a run gives but its times."""
    skipped = ["minutes", "runs", "hardware", "command", "commit", "commits", "precision", "stages"]
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
            kept = [name for stage, names in self.sound.stages.items() if stage not in lost for name in names]
            ours, theirs = (result(folder, kept, bool(lost)) for folder in (self.out, self.sound.finished))
            if different := [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]:
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
