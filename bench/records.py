"""What the benchmarks share: the flags of those that measure speed, and the head of their records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minicd.tasks.commands import Parser
from minicd.runtime.device import hardware, pick_device
from minicd.tasks.experiment import COMMIT, ROOT, command_line
from minicd.runtime.files import atomic_json


def parsed(parser: Parser, name: str, out: str = "the record") -> Any:
    """The arguments, with --cpu-time, --device and --out; the record is results/NAME.json unless told otherwise."""
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds: for a machine busy with other work")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / f"{name}.json", help=out)
    arguments = parser.parse_args()
    arguments.device = pick_device(arguments.device)
    return arguments


def publish(out: Path, device: torch.device, settings: dict[str, Any], results: list, **more: Any) -> None:
    """Write a record of `results`: what was run where, on which commit, and with which settings."""
    atomic_json(out, {
        "task": "bench", "scale": out.stem.removeprefix("bench-"), "commit": COMMIT, "command": command_line(),
        "hardware": hardware(device), "threads": torch.get_num_threads(), "torch": torch.__version__, **more,
        "settings": settings, "results": results})
