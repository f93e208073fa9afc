"""The pocket base of the experiments on instructions: a small T5, tuned on generated tasks as the paper tunes its teacher (B.1).

It reads a definition, 0 to 3 positive and 0 to 3 negative examples, explained or not, and an input, and writes the output
(`world.py`). The functions of the evaluation tasks in data/instructions/test do not occur in its training.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import numpy as np

from ..t5 import T5, T5Config
from ..tokenizer import TextTokenizer, word_tokenizer
from . import world
from .instructions import InstructionSettings, bare, score, with_explanations, without_explanations
from .natural_instructions import load_folder

TASKS = Path(__file__).resolve().parents[2] / "data" / "instructions" / "test"


def world_tokenizer() -> TextTokenizer:
    return word_tokenizer(world.world_words())


def world_config(vocab_size: int) -> T5Config:
    """1.8 million parameters; few heads, since half of the time goes into their scores."""
    return T5Config(vocab_size=vocab_size, d_model=128, d_kv=32, d_ff=384, num_heads=4, num_layers=4, num_decoder_layers=3,
                    feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0)


@cache
def training_pool() -> world.TaskPool:
    return world.TaskPool(world.training_tasks())


def world_item(rng: random.Random, done: float) -> tuple[str, str]:
    """Short lists and no examples first, as for the other base; the paper's 0 to 3 examples after a fifth of the steps."""
    most_examples = 0 if done < 0.08 else 1 if done < 0.2 else 3
    return world.draw_item(rng, training_pool(), min(world.LONGEST, 3 + round(8 * done)), most_examples)


def held_out_rouge(model: T5, tokenizer: TextTokenizer, n: int) -> dict[str, float]:
    """Mean Rouge-L over the evaluation tasks, n instances in all: whole prompt, without explanations, bare input."""
    tasks, settings = load_folder(TASKS), InstructionSettings()
    each = -(-n // len(tasks))
    templates = {"full": with_explanations, "without_explanations": without_explanations, "bare": lambda task: bare}
    return {name: round(float(np.mean([score(model, tokenizer, template(task), task.instances[:each], settings).rouge
                                       for task in tasks])), 2) for name, template in templates.items()}
