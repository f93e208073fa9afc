"""Train: one command for each experiment of the paper. Start with `python train.py --task addition`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.world.bases import Pocket
from minicd import tasks
from minicd.runtime.device import pick_device
from minicd.runtime.jobs import usual_jobs
from minicd.tasks.run import train
from minicd.tasks.settings import command_line, guarded, option, settings_from

TASKS = {**tasks.TASKS, "pocket": Pocket}


@dataclass
class Flags:
    """What every run has, whatever the experiment."""

    task: str = option("", f"the experiment: {', '.join(TASKS)}; with --help, its settings too")
    out: str = option("", "run folder, unless told otherwise runs/TASK, with --scale runs/TASK-SCALE, with "
                     "--quick runs/TASK-quick; a rerun resumes what it finds there")
    seeds: list[int] = option(lambda: [0], "a run for each; several give mean and spread", least=0,
                             most=2**32 - 1)
    device: str = option("auto", "cpu, cuda, or auto: cuda where there is one")
    jobs: int = option(0, "stages and seeds side by side; 0: one per core; on CUDA one", least=0, most=256)
    quick: bool = option(False, "the same stages in a minute or two, on a smaller problem")
    publish: bool = option(False, "also write the record into results/, from which README is made")
    join: bool = option(False, "with --publish: keep the other seeds of the record that is in results/")


def main() -> None:
    arguments, flags, task = command_line(__doc__, Flags, TASKS, lambda kind: (
        kind.Settings, next(iter(kind.SCALES.values()))))
    if flags.quick and flags.publish:
        raise ValueError("--publish is for whole runs, not for --quick ones")
    if flags.join and not flags.publish:
        raise ValueError("--join goes with --publish")
    usual = next(iter(task.SCALES))
    named = usual if arguments.scale is None else arguments.scale
    scale = task.SCALES.get(named)
    if scale is None:
        raise ValueError(f"--scale {named}: known scales are {', '.join(task.SCALES)}")
    if flags.quick and named != usual:
        raise ValueError(f"--quick is for --scale {usual}; at another scale, say with flags what is to be "
                         "smaller")
    settings = settings_from(arguments, task.Settings, scale, task.QUICK if flags.quick else {})
    if arguments.out == "":
        raise ValueError("--out is empty: it must be the name of a folder")
    usually = flags.task + f"-{named}" * (named != usual) + "-quick" * flags.quick
    out = Path(flags.out or Path("runs") / usually)
    device = pick_device(flags.device)
    train(flags.task, task, settings, list(dict.fromkeys(flags.seeds)), out, device,
          jobs=flags.jobs or usual_jobs(device), quick=flags.quick, publish=flags.publish, join=flags.join)


if __name__ == "__main__":
    guarded(main)
