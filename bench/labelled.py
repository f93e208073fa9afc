"""How many labelled scratchpads does the teacher need? Its validation accuracy at several budgets.

    python -m bench.labelled --seeds 0 1 2   # writes results/addition-labelled.json and (matplotlib) .png

Every budget gets the same number of optimiser steps as train.py's default. A rerun resumes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.common import ROOT, Parser, count, guarded, png, seed_number
from minicd.runtime.device import pick_device
from minicd.runtime.files import atomic_json
from minicd.runtime.jobs import usual_jobs
from minicd.runtime.lock import one_writer
from minicd.tasks.addition import Addition, AdditionSettings
from minicd.tasks.folder import RunFolder
from minicd.tasks.record import make_record
from minicd.tasks.run import make_all, seed_folder

DEFAULT = AdditionSettings()


def main() -> None:
    arguments = parse()
    with one_writer(arguments.out):
        work(arguments)


def work(arguments: Any) -> None:
    """All teachers, then record and picture."""
    runs = {budget: [experiment(budget, number, arguments) for number in arguments.seeds]
            for budget in arguments.budgets}
    jobs = arguments.jobs or usual_jobs(arguments.device)
    make_all([run for several in runs.values() for run in several], jobs)
    figures = [{"metrics": {str(budget): several[i].folder.get("teacher_validation")["accuracy"]
                            for budget, several in runs.items()}} for i in range(len(arguments.seeds))]
    notes = [{f"{budget}--{stage}": note for budget, several in runs.items()
              for stage, note in several[i].folder.notes().items()} for i in range(len(arguments.seeds))]
    result = make_record("addition", replace(DEFAULT, scale="labelled"), arguments.seeds, figures, notes, {})
    atomic_json(ROOT / "results" / "addition-labelled.json", result)
    for budget, metric in result["metrics"].items():
        print(budget, metric)
    png(ROOT / "results" / "addition-labelled.png", (4.5, 3), lambda axes: draw(axes, result["metrics"]))


def parse() -> Any:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--budgets", type=count, nargs="+", default=[250, 499, 1000, 2000, 5000],
                        help="labelled questions")
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="auto", type=pick_device)
    parser.add_argument("--jobs", type=count, help="teachers side by side (default: one for each CPU core)")
    parser.add_argument("--reuse", type=Path, help="the table's run folder, to take its teachers from")
    parser.add_argument("--out", type=Path, default=Path("runs/labelled"), help="run folder")
    return parser.parse_args()


def experiment(budget: int, number: int, arguments: Any) -> Addition:
    """The experiment of this budget and seed number, up to its teacher."""
    epochs = max(1, round(DEFAULT.teacher_epochs * DEFAULT.train_questions / budget))
    settings = replace(DEFAULT, train_questions=budget, teacher_epochs=epochs, until="teacher", floor=0.0)
    folder = RunFolder(arguments.out / str(budget) / f"seed-{number}", arguments.device)
    folder.claim(settings)
    if arguments.reuse and budget == DEFAULT.train_questions:
        folder.borrow(seed_folder(arguments.reuse, number), ["teacher", "teacher_validation"])
    return Addition(settings, number, folder)


def draw(axes: Any, metrics: dict[str, Any]) -> None:
    budgets = list(map(int, metrics))
    axes.errorbar(budgets, [m["mean"] for m in metrics.values()],
                  yerr=[m["std"] or 0.0 for m in metrics.values()], marker="o", capsize=3)
    axes.set(xscale="log", xlabel="labelled scratchpads", ylabel="teacher accuracy, %", xticks=budgets,
             xticklabels=budgets)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    guarded(main)
