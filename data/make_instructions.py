"""Write data/instructions/: tasks of the pocket world as files in the format of Natural Instructions.

    python data/make_instructions.py

train/ shows one task for each rule and some for two rules; the base is trained on far more, made on the fly
(data/world/tasks.py). test/ holds the evaluation tasks: their first 100 instances are for testing, the rest
for practice, as in Natural Instructions itself. The files do not depend on the machine.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minicd.runtime.files import atomic_json  # noqa: E402
from data.world.tasks import Task, evaluation_tasks, to_natural_instructions, training_tasks  # noqa: E402

TRAINING_TASKS, TRAINING_INSTANCES = 110, 20
TEST_INSTANCES = 100 + 100  # to test, to practise
FIRST_TEST_NUMBER = 501


def sample_training_tasks() -> list[Task]:
    """The first task of every rule, and of evenly spaced pairs of rules."""
    first: dict[tuple[str, ...], Task] = {}
    for task in training_tasks():
        first.setdefault(tuple(step.rule for step in task.steps), task)
    singles = [task for task in first.values() if len(task.steps) == 1]
    pairs = [task for task in first.values() if len(task.steps) == 2]
    rest = TRAINING_TASKS - len(singles)
    return singles + [pairs[i * len(pairs) // rest] for i in range(rest)]


def write(folder: Path, tasks: list[Task], first_number: int, instances: int) -> None:
    """One file for each task; other files are removed."""
    names = {f"task{number:03d}_{task.name}.json": task for number, task in enumerate(tasks, first_number)}
    for name, task in names.items():
        atomic_json(folder / name, to_natural_instructions(task, instances))
    for path in folder.glob("*.json"):
        if path.name not in names:
            path.unlink()


def main(folder: Path = ROOT / "data" / "instructions") -> None:
    write(folder / "train", sample_training_tasks(), 1, TRAINING_INSTANCES)
    write(folder / "test", evaluation_tasks(), FIRST_TEST_NUMBER, TEST_INSTANCES)


if __name__ == "__main__":
    main()
