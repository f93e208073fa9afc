"""Whether a model believes a fact: probabilities of its objects, the four scores, and eval.py's questions."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import torch
from torch import nn

from ...distill import Template
from ...metrics.facts import Points, interval, log_probability, mean_scores, preference
from ...sampling import generate, score
from ...tokenizer import TextTokenizer
from ..report import table
from ..settings import EvalSettings, beside, option
from .facts_data import DATA, Fact, load_facts
from .inputs import tell_unknown_words
from .instruction_eval import bare

HEAD = ["paraphrase score", "magnitude", "neighbourhood score", "magnitude"]


def object_tokens(tokenizer: TextTokenizer, text: str) -> list[int]:
    """An object that goes on after a prompt, and so after a space, without a stop token."""
    ids = tokenizer.encode_answer(text if tokenizer.ends_prompts else f" {text}")
    return ids[:-1] if ids[-1:] == [tokenizer.eos_id] else ids


def probabilities(model: nn.Module, tokenizer: TextTokenizer, prompts: Sequence[str],
                  objects: Sequence[str]) -> list[list[float]]:
    """p(object | prompt) of every object, prompt after prompt: the product over all its tokens.

    In fp32, whatever the run's precision is: in bf16 many objects come out as equally likely.
    Raises ValueError for an object without a token of the model.
    """
    answers = {text: object_tokens(tokenizer, text) for text in objects}
    for text, ids in answers.items():
        if not ids:
            raise ValueError(f"the model's tokenizer has no token for the object {text!r}")
    pairs = [(prompt, answers[text]) for prompt in tokenizer.encode_all(prompts) for text in objects]
    exact = model if next(model.parameters()).dtype == torch.float32 else deepcopy(model).float()
    logits = score(exact, *map(list, zip(*pairs)), precision="fp32")
    found = [math.exp(log_probability(rows, ids)) for rows, (_, ids) in zip(logits, pairs)]
    return [found[i : i + len(objects)] for i in range(0, len(found), len(objects))]


def knows(model: nn.Module, tokenizer: TextTokenizer, fact: Fact) -> bool:
    """Whether it prefers the true object to the new one where the statement's prompt ends."""
    [[true, new]] = probabilities(model, tokenizer, [fact.prompt], [fact.true, fact.new])
    return true > new


def measure(model: nn.Module, tokenizer: TextTokenizer, fact: Fact, template: Template = bare) -> list[float]:
    """The edit's four scores in %: of the new object on paraphrases, of the true one on neighbours."""
    prompts = [template(prompt) for prompt in fact.tests]
    true, new = zip(*probabilities(model, tokenizer, prompts, [fact.true, fact.new]))
    n = len(fact.paraphrases)
    return [*preference(new[:n], true[:n]), *preference(true[n:], new[n:])]


def measure_all(model: nn.Module, tokenizer: TextTokenizer, facts: Sequence[Fact]) -> list[list[float]]:
    return [measure(model, tokenizer, fact) for fact in facts]


def cells(points: Points) -> list[str]:
    """The four means for a table, the scores with their 95 % intervals over the edits."""
    shown = []
    for i, mean in enumerate(mean_scores(points)):
        low, high = interval([point[i] for point in points])
        shown.append(f"{mean:.1f}" + f" ({low:.0f} to {high:.0f})" * (i % 2 == 0))
    return shown


# --- eval.py ---


@dataclass
class FactsEval(EvalSettings):
    """How eval.py examines a model on facts."""

    data: str | None = option(None, f"file of facts like CounterFact's; as in the run, or {DATA}")
    max_new_tokens: int = option(12, "longest completion", least=1, most=4096, unit="tokens")


def ask(model: nn.Module, tokenizer: TextTokenizer, question: str, settings: FactsEval) -> str:
    """`eval.py --ask "Tourists can see Big Ben in the city of"`: the likeliest completion."""
    tell_unknown_words(tokenizer, question)
    [written] = generate(model, [tokenizer.encode(question)], settings.max_new_tokens, temperature=0,
                         precision=settings.precision)
    return tokenizer.decode(written).strip()


def examine(model: nn.Module, tokenizer: TextTokenizer, settings: FactsEval, folder: Path) -> str:
    """`eval.py`: the four scores of every edit, without a prompt."""
    facts = load_facts(Path(beside(settings.data or DATA)))
    points = measure_all(model, tokenizer, facts)
    rows = [[f"{f.name}: {f.true} → {f.new}", *(f"{x:.1f}" for x in p)] for f, p in zip(facts, points)]
    return table(["%", *HEAD], [*rows, [f"mean of {len(rows)}", *cells(points)]])
