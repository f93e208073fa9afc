"""How many labelled scratchpads does the teacher need? Its validation accuracy at several budgets, as a record and a plot.

    python -m bench.labelled --seeds 0 1 2          # writes results/addition-labelled.json and .png (the plot needs matplotlib)

Every budget gets the same number of optimiser steps as train.py's default. A rerun resumes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from minicd.tasks.commands import Parser, guarded
from minicd.runtime.device import pick_device
from minicd.tasks.experiment import ROOT, RunFolder, read_json, record, seed_folder, spread
from minicd.runtime.files import atomic_json
from minicd.tasks.addition import AdditionRun, AdditionSettings


DEFAULT = AdditionSettings()


def main() -> None:
    arguments = parse()
    folders = {str(budget): run_folders(budget, arguments) for budget in arguments.budgets}
    metrics, minutes = {}, {}
    for budget, runs in folders.items():
        metrics[budget] = [accuracy(settings, seed, folder, arguments.device)
                           for seed, (settings, folder) in zip(arguments.seeds, runs)]
        minutes[budget] = [round(sum(folder.notes("minutes").values()), 2) for _, folder in runs]
        print(budget, spread(metrics[budget]))
    used = [folder for runs in folders.values() for _, folder in runs]
    result = record("addition", "labelled", arguments.seeds, DEFAULT, used, metrics) | {"minutes": minutes}
    atomic_json(ROOT / "results" / "addition-labelled.json", result)
    plot(result, ROOT / "results" / "addition-labelled.png")


def parse():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--budgets", type=int, nargs="+", default=[250, 499, 1000, 2000, 5000], help="labelled questions")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="auto", type=pick_device)
    parser.add_argument("--reuse", type=Path, help="run folder of the table, whose teachers serve for their own budget")
    parser.add_argument("--out", type=Path, default=Path("runs/labelled"), help="run folder")
    return parser.parse_args()


def run_folders(budget: int, arguments) -> list[tuple[AdditionSettings, RunFolder]]:
    """Settings and folder of this budget for every seed."""
    epochs = max(1, round(DEFAULT.teacher_epochs * DEFAULT.train_questions / budget))
    settings = replace(DEFAULT, train_questions=budget, teacher_epochs=epochs, until="teacher", floor=0.0)
    runs = []
    for seed in arguments.seeds:
        folder = RunFolder(arguments.out / str(budget) / f"seed-{seed}", settings, arguments.device)
        if arguments.reuse and budget == DEFAULT.train_questions:
            table = seed_folder(arguments.reuse, seed)
            folder.borrow(table, ["teacher", "teacher_validation.json"])
            folder.note("minutes", "teacher", read_json(table / "minutes.json")["teacher"])
        runs.append((settings, folder))
    return runs


def accuracy(settings: AdditionSettings, seed: int, folder: RunFolder, device) -> float:
    """Percent of the validation questions that a teacher of this budget solves."""
    run = AdditionRun(settings, seed, folder, device)
    run.check_teacher(run.teacher())
    return folder.value("teacher_validation", dict)["accuracy"]


def plot(result: dict, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    budgets = [int(budget) for budget in result["metrics"]]
    means = [m["mean"] for m in result["metrics"].values()]
    stds = [m["std"] or 0.0 for m in result["metrics"].values()]
    figure, axes = pyplot.subplots(figsize=(4.5, 3))
    axes.errorbar(budgets, means, yerr=stds, marker="o", capsize=3)
    axes.set(xscale="log", xlabel="labelled scratchpads", ylabel="teacher accuracy, %", xticks=budgets, xticklabels=budgets)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    print(f"plot in {path}")


if __name__ == "__main__":
    guarded(main)
