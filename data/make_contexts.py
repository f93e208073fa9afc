"""The inputs of the worked contexts files, data/contexts/*.jsonl: the same files every time."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from data.world.lists import TABLES, column_scratchpad  # noqa: E402


def reversals(rng: random.Random) -> tuple[str, str]:
    items = rng.choices("abcdefgh", k=rng.randint(3, 6))
    return " ".join(items), " ".join(reversed(items))


def columns(rng: random.Random) -> tuple[str, str]:
    length = rng.randint(1, 2)
    a, b = rng.choices("0123456789", k=length), rng.choices("0123456789", k=length)
    return f"{' '.join(a)} | {' '.join(b)}", " ".join(column_scratchpad(a, b, TABLES["op0"])[1])


def instances() -> dict[str, str]:
    """Those of a task file of data/instructions."""
    task = json.loads((HERE / "instructions" / "test" / "task530_keep_fruit.json").read_text())
    return {instance["input"]: instance["output"][0] for instance in task["Instances"]}


def write(name: str, pairs: dict[str, str]) -> None:
    lines = (json.dumps({"question": question, "answer": answer}) for question, answer in pairs.items())
    (HERE / "contexts").mkdir(exist_ok=True)
    (HERE / "contexts" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    for name, make in (("lists", reversals), ("columns", columns)):
        rng = random.Random(name)
        write(name, dict(make(rng) for _ in range(600)))
    write("fruits", instances())
