"""The text of the base data/pocket-instructions: generated tasks (`tasks.py`), in place of the paper's (B.1).

A prompt has a definition, 0 to 3 positive and 0 to 3 negative examples, explained or not, and an input. The
functions of the evaluation tasks in data/instructions/test do not occur in training.
"""

from __future__ import annotations

import random
from functools import cache

import numpy as np

from minicd.t5 import T5
from minicd.tasks.parts.instruction_eval import DATA, PROMPTS, TaskEval, rouge_by_prompt
from minicd.tasks.parts.natural_instructions import load_folder
from minicd.tasks.record import ROOT
from minicd.tokenizer import TextTokenizer, word_tokenizer

from . import tasks as world
from .words import world_words

PLACES = ("copy", "reverse", "first", "last", "second", "drop_first", "drop_last", "swap_ends", "twice",
          "double", "first_to_end")
TASKS = ROOT / DATA


def world_tokenizer() -> TextTokenizer:
    return word_tokenizer(world_words())


@cache
def training_pool(steps: int = 2, rules: tuple[str, ...] = ()) -> world.TaskPool:
    """The training tasks of at most `steps` steps, only with `rules` where some are named."""
    return world.TaskPool([task for task in world.training_tasks() if len(task.steps) <= steps
                           and (not rules or task.steps[0].rule in rules)])


def world_item(rng: random.Random, done: float) -> tuple[str, str]:
    """First rules about places in the list, then all rules, then two at a time; later examples and raw text.

    With everything from the start, the model did not learn to copy in 2,000 steps (results/LOG.md).
    """
    if done < 0.08:
        return world.draw_item(rng, training_pool(1, PLACES), 1 + int(65 * done), most_examples=0, raw=0.0)
    if done < 0.5:
        return world.draw_item(rng, training_pool(1 if done < 0.25 else 2), most_examples=0, raw=0.0)
    return world.draw_item(rng, training_pool(), most_examples=1 if done < 0.7 else 2 if done < 0.85 else 3)


def held_out_rouge(model: T5, tokenizer: TextTokenizer, n: int) -> dict[str, float]:
    """Mean Rouge-L over the evaluation tasks, n instances in all, under each prompt of PROMPTS."""
    tasks = load_folder(TASKS)
    rows = rouge_by_prompt(model, tokenizer, tasks, -(-n // len(tasks)), TaskEval()).values()
    return {name: round(float(np.mean([row[name] for row in rows])), 2) for name in PROMPTS}
