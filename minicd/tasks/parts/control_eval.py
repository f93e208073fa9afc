"""How eval.py asks a model for the end of a review, and judges its endings (paper, appendix A.1)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...metrics.sentiment import Judge
from ...sampling import generate
from ...tokenizer import TextTokenizer
from ..folder import RunFolder
from ..settings import EvalSettings, option
from .inputs import tell_unknown_words
from .instruction_eval import end_with_line
from .reviews import KINDS, of_split, texts_of
from .steering import bare_review

LONGEST = 40  # tokens of a completion, unless settings say otherwise
SAMPLES = 4  # completions of each beginning


@dataclass
class ControlEval(EvalSettings):
    """How eval.py examines a model that completes reviews."""

    run: str = option("", "run folder with the judge and the test beginnings; that of the model unless given")
    samples: int | None = option(None, f"completions of each beginning; as in the run, or {SAMPLES}", least=1)
    max_new_tokens: int | None = option(None, f"longest completion; as in the run, or {LONGEST} tokens",
                                        least=1, most=4096)


def completions(model: nn.Module, tokenizer: TextTokenizer, prompts: list[str], longest: int,
                generator: torch.Generator, precision: str, name: str = "") -> list[str]:
    """Sampled at temperature 1, up to the end of the line."""
    written = generate(model, tokenizer.encode_all(prompts), longest, temperature=1.0, generator=generator,
                       precision=precision, progress=name)
    return [tokenizer.decode(y) for y in written]


def ask(model: nn.Module, tokenizer: TextTokenizer, question: str, settings: ControlEval) -> str:
    """`eval.py --ask BEGINNING`: the rest of the review, sampled; the same one every time."""
    tell_unknown_words(tokenizer, question)
    return completed(model, tokenizer, [question.strip()], settings)[0].strip()


def completed(model: nn.Module, tokenizer: TextTokenizer, beginnings: list[str], settings: ControlEval,
              name: str = "") -> list[str]:
    end_with_line(model, tokenizer)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    return completions(model, tokenizer, [bare_review(x) for x in beginnings],
                       settings.max_new_tokens or LONGEST, generator, settings.precision, name)


def examine(model: nn.Module, tokenizer: TextTokenizer, settings: ControlEval, folder: Path) -> str:
    """`eval.py`: the share of reviews that end well, of both kinds of test beginnings.

    Raises ValueError where there is no run with a judge.
    """
    places = [Path(settings.run)] if settings.run else [folder, *folder.parents]
    run = next((place for place in places if (place / "judge.json").exists()), None)
    if run is None:
        raise ValueError(f"{settings.run or folder} is in no run of --task control, which would have a "
                         "judge: name one with --run")
    kept = RunFolder(run, next(model.parameters()).device)
    judge, tests = Judge(kept.get("judge")["weights"]), of_split(kept.get("beginnings"), "test")
    lines = []
    for label, kind in enumerate(KINDS):
        beginnings = [x for x in texts_of(tests, label) for _ in range(settings.samples or SAMPLES)]
        texts = completed(model, tokenizer, beginnings, settings, kind)
        lines.append(f"{kind} beginnings: {judge.share(texts, 1):.1f} % end well, "
                     f"{judge.share(texts, 0):.1f} % badly")
    return "\n".join(lines)
