"""Train: one command for each experiment of the paper. `python train.py --task addition` is the place to start."""

from __future__ import annotations

import sys
from pathlib import Path

from data.world import bases
from minicd.tasks.commands import Parser, add_settings, choose, guarded, settings_from
from minicd.runtime.device import pick_device
from minicd.tasks import addition, explanations, instructions, task_ids

TASKS = {"addition": addition, "instructions": instructions, "explanations": explanations, "task_ids": task_ids, "pocket": bases}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--task", help=f"the experiment: {', '.join(TASKS)}; with --help, its settings too")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/TASK); a rerun resumes what it finds there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run for each; several give mean and spread")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (default): cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="the same stages in about a minute, on a smaller problem")
    parser.add_argument("--publish", action="store_true", help="also write the record into results/, from which README is made")
    task = choose(task_name(parser), TASKS)
    add_settings(parser, task.Settings)
    arguments = parser.parse_args()
    if arguments.quick and arguments.publish:
        raise ValueError("--publish is for whole runs, not for --quick ones")
    scale = task.SCALES.get(arguments.scale or "pocket")
    if scale is None:
        raise ValueError(f"--scale {arguments.scale}: known scales are {', '.join(task.SCALES)}")
    settings = settings_from(arguments, task.Settings, scale, task.QUICK if arguments.quick else {})
    out = arguments.out or Path("runs") / (arguments.task + ("-quick" if arguments.quick else ""))
    task.train(settings, list(dict.fromkeys(arguments.seeds)), out, pick_device(arguments.device), arguments.publish)


def task_name(parser: Parser) -> str:
    """Look for --task before the other flags are known, since they depend on it."""
    words = sys.argv[1:]
    for i, word in enumerate(words):
        if word.startswith("--task="):
            return word.removeprefix("--task=")
        if word == "--task" and i + 1 < len(words):
            return words[i + 1]
    parser.parse_args()  # shows --help, or names an unknown flag
    parser.error(f"--task is missing; tasks: {', '.join(TASKS)}")


if __name__ == "__main__":
    guarded(main)
