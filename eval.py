"""Evaluate a checkpoint on unseen inputs, ask it one question, or rebuild the tables from results/."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.tables import TABLES
from minicd.hf.checkpoint import load
from minicd.runtime.device import pick_device
from minicd.runtime.progress import printable
from minicd.tasks.report import rebuild
from minicd.tasks.settings import as_in_run, beside, command_line, guarded, option, settings_from
from train import TASKS


@dataclass
class Flags:
    """What every evaluation has, whatever the experiment."""

    task: str = option("addition", f"the experiment: {', '.join(TASKS)}; with --help, its settings too")
    model: str = option("", "folder (or hub id) of the checkpoint")
    ask: str | None = option(None, 'answer one question, for example "12345678 + 87654321", or a prompt')
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
    settings = as_in_run(settings_from(arguments, task.Eval), Path(flags.model).parent)
    model, tokenizer = load(beside(flags.model), pick_device(flags.device))
    if flags.ask is not None:
        print(printable(task.ask(model, tokenizer, flags.ask, settings)))
    else:
        print(printable(task.examine(model, tokenizer, settings, Path(flags.model))))


if __name__ == "__main__":
    guarded(main)
