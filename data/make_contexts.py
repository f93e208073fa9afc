"""Inputs of worked contexts files, data/contexts/*.jsonl but for place: the same files every time."""

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


def word_problems(rng: random.Random) -> tuple[str, str]:
    """Two steps of adding and taking away, with digits: at most 27."""
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    c = rng.randint(1, min(9, a + b - 1))
    story, ends = rng.choice(STORIES), rng.random() < 0.5
    how, answer = (story[1], a + b - c) if ends else (story[2], a + b + c)
    who, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    return f"{story[0]} {how}".format(who=who, thing=thing, a=a, b=b, c=c), str(answer)


PEOPLE = ("Anna", "Bruno", "Carla", "David", "Ella", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Kira", "Leo")
THINGS = ("apples", "books", "shells", "stamps", "marbles", "cards", "buttons", "pencils", "cookies", "coins")
STORIES = (("{who} has {a} {thing} and finds {b} more.", "Then {who} loses {c}. How many {thing} are left?",
            "Then {who} gets {c} more. How many {thing} does {who} have?"),
           ("There are {a} {thing} on the table and {b} in the box.",
            "{who} takes {c} away. How many are left?", "{who} brings {c} more. How many are there now?"),
           ("{who} buys {a} {thing} on one day and {b} on the next.",
            "{who} gives {c} to a friend. How many remain?",
            "A friend gives {who} {c} more. How many is that in all?"))


def instances() -> dict[str, str]:
    """Those of a task file of data/instructions."""
    task = json.loads((HERE / "instructions" / "test" / "task530_keep_fruit.json").read_text())
    return {instance["input"]: instance["output"][0] for instance in task["Instances"]}


def write(name: str, pairs: dict[str, str]) -> None:
    lines = (json.dumps({"question": question, "answer": answer}) for question, answer in pairs.items())
    (HERE / "contexts").mkdir(exist_ok=True)
    (HERE / "contexts" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    for name, make in (("lists", reversals), ("columns", columns), ("think", word_problems)):
        rng = random.Random(name)
        write(name, dict(make(rng) for _ in range(600)))
    write("fruits", instances())
