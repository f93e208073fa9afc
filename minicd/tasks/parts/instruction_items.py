"""Items of Natural Instructions with their own answers, for a student that must not forget to follow them.

The paper mixes them into distillation (section 3.3, hypothesis 7; appendix B.6: the "2 positive" split).
"""

from __future__ import annotations

from pathlib import Path
from typing import Container

import numpy as np

from ...labels import Examples
from ...tokenizer import TextTokenizer
from .instruction_eval import instructed
from .natural_instructions import NITask, load_folder

SHAPE = "positives"  # of the prompts: the definition and 2 positive examples
SUMS = "Mathematics"  # the category of tasks that are left out: some are word problems


def load_split(folder: Path, split: str) -> list[NITask]:
    """The train or test tasks: in a folder of that name inside, or named by the collection's list beside it.

    Raises ValueError where there is neither, and what `load_folder` raises.
    """
    folder = Path(folder)
    if (folder / split).is_dir():
        return load_folder(folder / split)
    names = folder.parent / "splits" / "default" / f"{split}_tasks.txt"
    if not names.is_file():
        raise ValueError(f"{folder} has no folder {split!r}, and {names} is missing, the list of its {split} "
                         "tasks: name the folder tasks of Natural Instructions with --data")
    return load_folder(folder, set(names.read_text(encoding="utf-8").split()))


def draw_items(tasks: list[NITask], n: int, tokenizer: TextTokenizer, longest: int, forbidden: Container[str],
               rng: np.random.Generator) -> list[tuple[str, str]]:
    """n items in random order, or as many as there are, of at most `longest` tokens: prompts, true answers.

    An answer is the first of those that count as right, on one line. Items that are `forbidden` are left out.
    Raises ValueError where nothing is left.
    """
    pairs = [(task, instance) for task in tasks if SUMS not in task.categories for instance in task.instances]
    found: list[tuple[str, str]] = []
    for i in rng.permutation(len(pairs)).tolist():
        task, instance = pairs[i]
        asked, answer = instructed(task, SHAPE)(instance.input), f" {instance.outputs[0].strip()}"
        if "\n" in answer or f"{asked}{answer}" in forbidden:
            continue
        if len(tokenizer.encode(asked)) + len(tokenizer.encode_answer(answer)) <= longest:
            found.append((asked, answer))
        if len(found) == n:
            break
    if not found:
        raise ValueError(f"of {len(pairs)} instruction items none can be used: raise --item-tokens, "
                         f"now {longest}")
    return found


def with_true_answers(items: list[tuple[str, str]], tokenizer: TextTokenizer) -> Examples:
    prompts, answers = zip(*items)
    return Examples.hard(tokenizer.encode_all(prompts), tokenizer.encode_answers(answers))
