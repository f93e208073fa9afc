"""What the benchmarks share: flags, records, two sides that take turns, plots, and transformers."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, Callable

import torch

from minicd.runtime.device import hardware, pick_device
from minicd.runtime.files import atomic_json
from minicd.tasks.record import ROOT, command_line, commit
from minicd.tasks.report import picture
from minicd.tasks.settings import LARGEST, Parser, guarded

__all__ = ["ROOT", "Parser", "count", "guarded", "import_transformers", "parsed", "png", "publish",
           "seed_number", "turns"]
COMMIT = commit()  # when the program started: the files may change while it runs


# flags and records


def count(text: str) -> int:
    """The value of a flag that counts something of which there is at least one."""
    if not 1 <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and {LARGEST:g}")
    return int(text)


def seed_number(text: str) -> int:
    """The value of a flag that is a seed."""
    if not 0 <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {2**32 - 1}")
    return int(text)


def parsed(parser: Parser, name: str, out: str = "the record") -> Any:
    """The arguments, with --cpu-time, --device and --out; the record is results/NAME.json by default."""
    parser.add_argument("--cpu-time", action="store_true",
                        help="count processor seconds: for a machine busy with other work")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / f"{name}.json", help=out)
    arguments = parser.parse_args()
    arguments.device = pick_device(arguments.device)
    if arguments.device.type == "cuda" and arguments.device.index is not None:
        torch.cuda.set_device(arguments.device)  # whose clock and memory are read
    return arguments


def publish(out: Path, device: torch.device, settings: dict[str, Any], results: list,
            **more: Any) -> None:
    """Write a record of `results`: what was run where, on which commit, and with which settings."""
    atomic_json(out, {
        "task": "bench", "scale": out.stem.removeprefix("bench-"), "commit": COMMIT,
        "command": command_line(), "hardware": hardware(device), "threads": torch.get_num_threads(),
        "torch": torch.__version__, **more, "settings": settings, "results": results})


# two sides in turn


def turns(what: str, work: int, arguments, **sides: Callable) -> dict[str, Any]:
    """Time two sides in turn: work per second in every round, medians, the first's median ÷ the second's."""
    (a, b), (seconds, values) = sides, timed_turns(sides, arguments)
    rates = {name: [work / s for s in times[1:]] for name, times in seconds.items()}
    median = {name: statistics.median(rates[name]) for name in sides}
    ratio, first = round(median[a] / median[b], 2), {name: round(seconds[name][0], 2) for name in sides}
    result = {"what": what, "median": {name: readable(rate) for name, rate in median.items()}, "ratio": ratio,
              "rounds": {name: list(map(readable, rates[name])) for name in sides},
              "first_turn_seconds": first}
    if values[a]:  # completions
        result["same_completions"] = round(statistics.mean(map(list.__eq__, values[a], values[b])), 3)
    print(f"{what:46} {a} {median[a]:8.1f}  {b} {median[b]:8.1f}  ratio {ratio:.2f}  "
          f"first turn {first[a]:.1f} s", flush=True)
    return result


def readable(rate: float) -> float:
    """With three digits, or with all before the point."""
    return float(f"{rate:.3g}") if rate < 100 else round(rate, 1)


def timed_turns(sides: dict[str, Callable], arguments) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each side's turns, of which the first is not to count, and what its last one returned."""
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    wait = torch.cuda.synchronize if arguments.device.type == "cuda" else int
    seconds, values = {name: [] for name in sides}, {}
    for _ in range(arguments.rounds + 1):
        for name, side in sides.items():
            wait()
            start, values[name], _ = clock(), side(), wait()
            seconds[name].append(clock() - start)
    return seconds, values


# libraries that only benchmarks need


def import_transformers() -> Any:
    """Raises ValueError where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise ValueError("this compares with Hugging Face transformers, which is missing: "
                         "pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def png(path: Path, size: tuple[float, float], draw: Callable[[Any], None]) -> bool:
    """A picture of what `draw` draws on the axes, where matplotlib is installed. Whether there is one now."""
    if drawn := picture(path, size, draw):
        print(f"plot in {path}")
    return drawn
