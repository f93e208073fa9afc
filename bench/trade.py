"""What a student gains against what it forgets: by learning rate, steps and adapters, in one plot.

    python -m bench.trade                     # from the repository's root; company.toml, SmolLM2-135M
    python -m bench.trade --scale think       # another of the worked files
    pip install matplotlib                    # only for the plot

The teacher practises once, for all students. Each is measured several times while it trains, on the
held-out inputs (KL(teacher ‖ student) a token, before: that of the base) and on the unrelated prompts of the
contexts file (KL(before ‖ now) a token). With adapters, these alone learn.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from bench.common import Parser, count, guarded, parsed, png, publish, seed_number
from minicd.distill import distill, practice
from minicd.runtime.lora import copy_to_train
from minicd.tasks import own
from minicd.tasks.folder import RunFolder
from minicd.tasks.parts import own_forgetting, own_measures

FULL, ADAPTED = (3e-5, 1e-4, 3e-4), (3e-4, 1e-3)  # learning rates
Point = dict[str, float]


class Measured:
    """A contexts file's first context: practised, and measured along the teacher's answers."""

    def __init__(self, arguments: Any):
        settings = own.OwnSettings(**own.Own.SCALES[arguments.scale])
        self.own = own.Own(settings, arguments.seed, RunFolder(arguments.folder, arguments.device))
        self.own.folder.claim(settings)
        if not self.own.folder.file("inputs"):
            self.own.make(next(stage for stage in self.own.stages() if stage.name == "inputs"))
        self.name, self.model, self.tokenizer = self.own.file.rounds[0][0], self.own.base, self.own.tokenizer
        texts, named = self.own.folder.get("inputs")["texts"][self.name], self.own.file.contexts[self.name]
        self.tests = own.split(texts, named)[0][: settings.most_tests]
        self.context = self.own.context(self.name, self.tests)
        self.answers = own_measures.teacher_answers(self.model, self.tokenizer, self.context, self.tests,
                                                    settings)
        self.unrelated = own.bare_prompts(self.own.file.unrelated, self.own.chat, self.own.file)

    def practised(self) -> Any:
        how = self.own.how
        return practice(self.model, self.tokenizer, self.own.practised(self.name), how.items, how.practice,
                        seed=self.own.seed, folder=self.own.folder.path / "practice")

    def point(self, student: nn.Module) -> Point:
        settings = self.own.settings
        found = own_measures.along_teacher(self.model, student, self.tokenizer, self.context, self.tests,
                                           self.answers, settings)
        far = own_forgetting.forgotten(self.model, student, self.tokenizer, self.unrelated, settings)
        return {"kl": round(found["kl"][0], 2), "forgotten": round(far["forgotten"][0], 2)}


def line(measured: Measured, items: Any, rank: int, lr: float, arguments: Any) -> dict[str, Any]:
    """One student: its points by step."""
    how, points = measured.own.how, []
    student = copy_to_train(measured.model, rank)

    def evaluate(step: int, steps: int) -> None:
        if step * arguments.points >= steps * (len(points) + 1):
            points.append({"step": step, **measured.point(student)})
    distill(student, items, replace(how.fit, lr=lr, lora_rank=rank), epochs=arguments.epochs,
            seed=arguments.seed, evaluate=evaluate)
    print(f"rank {rank or 'full'}, learning rate {lr:g}: {points[-1]}", flush=True)
    return {"rank": rank, "lr": lr, "points": points}


def draw(axes: Any, before: float, results: list[dict[str, Any]]) -> None:
    colours = {rank: f"C{i}" for i, rank in enumerate(dict.fromkeys(row["rank"] for row in results))}
    for row in results:
        title = f"rank {row['rank']}" if row["rank"] else "all weights"
        x, y = ([point[key] for point in row["points"]] for key in ("forgotten", "kl"))
        axes.plot(x, y, marker=".", color=colours[row["rank"]], linewidth=1)
        axes.annotate(f"{title}, {row['lr']:g}", (x[-1], y[-1]), fontsize=6)
    axes.axhline(before, color="grey", linestyle=":")
    axes.set(xlabel="forgotten: KL(before ‖ now), 1/1000 nat", ylabel="KL(teacher ‖ student), 1/1000 nat",
             xscale="log", yscale="log")
    axes.grid(alpha=0.3)


def parse() -> Any:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=list(own.WORKED), default="company", help="which worked file")
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--ranks", type=count, nargs="*", default=[4, 32], help="of the adapters")
    parser.add_argument("--epochs", type=count, default=6, help="passes over the practice set")
    parser.add_argument("--points", type=count, default=4, help="measures of each student")
    parser.add_argument("--folder", type=Path, help="where the practice set is kept; runs/trade-SCALE")
    arguments = parsed(parser, "bench-trade")
    arguments.folder = arguments.folder or Path(f"runs/trade-{arguments.scale}")
    return arguments


def main() -> None:
    arguments, start = parse(), time.monotonic()
    measured = Measured(arguments)
    items, before = measured.practised(), measured.point(measured.model)["kl"]
    variants = [(0, lr) for lr in FULL] + [(rank, lr) for rank in arguments.ranks for lr in ADAPTED]
    results = [line(measured, items, rank, lr, arguments) for rank, lr in variants]
    settings = {"scale": arguments.scale, "epochs": arguments.epochs, "items": len(items), "before": before,
                "seed": arguments.seed}
    publish(arguments.out, arguments.device, settings, results,
            minutes=round((time.monotonic() - start) / 60, 2))
    png(arguments.out.with_suffix(".png"), (6, 4.5), lambda axes: draw(axes, before, results))


if __name__ == "__main__":
    guarded(main)
