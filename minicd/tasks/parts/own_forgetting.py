"""What a student of own.py forgot: how far it is from its base where nothing should change."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer
from torch import nn

from ...metrics import rouge_l
from ...sampling import generate
from ...tokenizer import TextTokenizer
from ..record import ROOT
from .forgetting import NEUTRAL, compare_along
from .instruction_eval import DATA, LONGEST, answers, with_explanations
from .natural_instructions import load_folder
from .own_measures import Figures, ratio

POCKET = ROOT / "data" / "pocket-instructions"
EVERY, INSTANCES = 4, 10  # of its tasks every fourth, and of each the first instances
LONGEST_TEXT = 32  # tokens of the base's own text after an unrelated prompt


def measure(base: nn.Module, model: nn.Module, tokenizer: TextTokenizer, prompts: list[str],
            settings: Any) -> Figures:
    """KL and agreement on the prompts, where the model is not the base; and Rouge-L on the pocket's tasks."""
    found = forgotten(base, model, tokenizer, prompts, settings) if prompts and model is not base else {}
    return found | (on_tasks(model, tokenizer, settings) if is_pocket(tokenizer) else {})


def forgotten(base: nn.Module, model: nn.Module, tokenizer: TextTokenizer, prompts: list[str],
              settings: Any) -> Figures:
    """KL(θ₀ ‖ θ) along the base's own greedy answers."""
    ids = tokenizer.encode_all(prompts)
    written = generate(base, ids, min(LONGEST_TEXT, settings.max_new_tokens), 0, keep_end=True,
                       precision=settings.precision)
    ids, texts = [prompt for prompt, y in zip(ids, written) if y], [y for y in written if y]
    divergence, same = compare_along(base, model, ids, texts, settings.precision)
    counts = [len(text) for text in texts]
    return {"forgotten": ratio(divergence, counts, 1000), "agreement": ratio(same, counts, 100)}


def others(tokenizer: TextTokenizer) -> list[str]:
    """Unrelated prompts where the contexts file has none: of the pocket's tasks, or the openings of texts.

    None of them where the model does not know their words.
    """
    if is_pocket(tokenizer):
        return [prompt for prompt, _ in task_prompts()]
    return [] if any(map(tokenizer.unknown_words, NEUTRAL)) else NEUTRAL


def on_tasks(model: nn.Module, tokenizer: TextTokenizer, settings: Any) -> Figures:
    """Rouge-L of greedy answers to the pocket's evaluation tasks, under their instructions."""
    prompts, references = zip(*task_prompts())
    how = SimpleNamespace(max_new_tokens=LONGEST, precision=settings.precision)
    texts = map(tokenizer.decode, answers(model, tokenizer, list(prompts), how, "tasks"))
    return {"tasks": ratio([rouge_l(*pair) for pair in zip(texts, references)], [1] * len(prompts), 100)}


@cache
def task_prompts() -> list[tuple[str, list[str]]]:
    """Prompts of the evaluation tasks with their references."""
    return [(with_explanations(task)(instance.input), instance.outputs)
            for task in load_folder(ROOT / DATA)[::EVERY] for instance in task.instances[:INSTANCES]]


def is_pocket(tokenizer: TextTokenizer) -> bool:
    """Whether it is that of data/pocket-instructions, which was tuned on such tasks, or of its student."""
    file = POCKET / "tokenizer.json"
    return file.exists() and Tokenizer.from_file(str(file)).get_vocab() == tokenizer.backend.get_vocab()
