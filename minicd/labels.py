"""Soft labels, kept sparse (token ids + counts or probabilities), and the practice sets that carry them.

A practice set is one safetensors file: prompts, answers, and a soft label for every answer token. It can be
inspected, shared, and trained on again with another loss.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Sequence

import torch
from torch import Tensor

from .runtime.checks import check_practice_set
from .runtime.files import all_tensors, atomic_safetensors, open_safetensors
from .sampling import draw


@dataclass
class Ragged:
    """Rows of different lengths in one flat tensor: row i is values[starts[i] : starts[i + 1]]."""

    values: Tensor  # [sum of lengths]
    starts: Tensor  # [rows + 1] int64

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], dtype: torch.dtype = torch.int32) -> Ragged:
        lengths = torch.tensor([0] + [len(row) for row in rows])
        return cls(torch.tensor([v for row in rows for v in row], dtype=dtype), lengths.cumsum(0))

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> Ragged:
        return cls.of([text.encode() for text in texts], torch.uint8)

    @classmethod
    def join(cls, parts: Sequence[Ragged]) -> Ragged:
        lengths = torch.cat([torch.zeros(1, dtype=torch.int64)] + [part.lengths for part in parts])
        return cls(torch.cat([part.values for part in parts]), lengths.cumsum(0))

    @property
    def lengths(self) -> Tensor:
        return self.starts.diff()

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> list[int]:
        i += len(self) * (i < 0)
        return self.values[self.starts[i] : self.starts[i + 1]].tolist()

    def gather(self, rows: Tensor, pad: int = 0) -> tuple[Tensor, Tensor]:
        """Row numbers [...] → values [..., longest], padded, and a mask [..., longest] of the real ones."""
        index, mask = self.positions(rows)
        if len(self.values) == 0:
            return torch.full(index.shape, pad), mask
        return self.values[index.clamp(max=len(self.values) - 1)].long().masked_fill(~mask, pad), mask

    def positions(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The indices of the rows' values in `values`, and the mask, both as in `gather`."""
        lengths = self.lengths[rows]
        column = torch.arange(max(1, int(lengths.max())))
        return self.starts[rows][..., None] + column, column < lengths[..., None]


@dataclass
class LabelBatch:
    """Soft labels of one batch, for `losses.py`: tokens [B, T], ids and weights [B, T, K], mask [B, T]."""

    tokens: Tensor
    ids: Tensor
    weights: Tensor
    mask: Tensor

    def to(self, device) -> LabelBatch:
        return LabelBatch(*(t.to(device, non_blocking=True) for t in vars(self).values()))


@dataclass
class SoftLabels:
    """Sparse distributions over the vocabulary at M positions: in row m the tokens `ids[m]` with weights.

    Weights are counts of draws (integers) or probabilities, whose sum may leave something for other tokens.
    """

    ids: Ragged
    weights: Tensor  # [entries] int32 or float32, aligned with ids.values

    @property
    def kind(self) -> str:
        """sampled; or of probabilities exact, or top where some of a sum is left for other tokens."""
        if not self.weights.is_floating_point():
            return "sampled"
        rows = torch.repeat_interleave(torch.arange(len(self.ids)), self.ids.lengths)
        sums = torch.zeros(len(self.ids), dtype=torch.float64).index_add(0, rows, self.weights.double())
        return "top" if (sums < 1 - 1e-3).any() else "exact"

    @classmethod
    def sample(cls, logits: Tensor, samples: int, generator: torch.Generator | None = None) -> SoftLabels:
        """The paper's empirical label (section 2.4): `samples` draws from softmax(logits [M, V]) a position.

        E[counts / samples] = softmax(logits), so a loss linear in the label keeps its expected gradient.
        """
        return cls.of_draws(draw(logits, samples, generator))

    @classmethod
    def of_draws(cls, draws: Tensor) -> SoftLabels:
        """Drawn tokens [M, samples] → how often each was drawn."""
        draws = draws.sort(-1).values.cpu()
        first = torch.ones_like(draws, dtype=torch.bool)  # the first of each run of equal tokens
        first[:, 1:] = draws[:, 1:] != draws[:, :-1]
        where = first.flatten().nonzero()[:, 0]
        counts = torch.cat([where, torch.tensor([draws.numel()])]).diff()
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), first.sum(-1).cumsum(0)])
        return cls(Ragged(draws.flatten()[where].int(), starts), counts.int())

    @classmethod
    def top(cls, logits: Tensor, k: int = 0) -> SoftLabels:
        """The k most likely tokens of softmax(logits [M, V]), or with k = 0 all of them: an exact label."""
        return cls.of_probabilities(*likeliest(logits, k))

    @classmethod
    def of_probabilities(cls, ids: Tensor, weights: Tensor) -> SoftLabels:
        """Tokens [M, K] and their probabilities [M, K]."""
        starts = torch.arange(len(ids) + 1) * ids.shape[1]
        return cls(Ragged(ids.int().cpu().flatten(), starts), weights.cpu().flatten())

    @classmethod
    def one_hot(cls, tokens: Tensor) -> SoftLabels:
        """Hard labels for tokens [M]: each a single sample, or a token of probability 1."""
        ids = Ragged(tokens.to(torch.int32, copy=True), torch.arange(len(tokens) + 1))
        return cls(ids, torch.ones(len(tokens), dtype=torch.int32))

    @classmethod
    def join(cls, parts: Sequence[SoftLabels]) -> SoftLabels:
        """Raises ValueError where counts and probabilities meet; a hard label is both."""
        counts = [part for part in parts if not part.weights.is_floating_point()]
        if 0 < len(counts) < len(parts) and not all(part.hard for part in counts):
            raise ValueError("sampled labels cannot be joined with exact or top-k ones")
        return cls(Ragged.join([part.ids for part in parts]), torch.cat([part.weights for part in parts]))

    @property
    def hard(self) -> bool:
        """Whether each is one token of weight 1."""
        return len(self.weights) == len(self.ids) and bool((self.weights == 1).all())

    def split(self, lengths: Sequence[int]) -> list[SoftLabels]:
        """The labels of consecutive positions: as many as `lengths` says, in turn."""
        ends = torch.tensor([0, *lengths]).cumsum(0)
        parts = []
        for first, last in zip(ends[:-1].tolist(), ends[1:].tolist()):
            starts = self.ids.starts[first : last + 1]
            entries = slice(int(starts[0]), int(starts[-1]))
            ids = Ragged(self.ids.values[entries], starts - starts[0])
            parts.append(SoftLabels(ids, self.weights[entries]))
        return parts

    def gather(self, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, T] and the mask of the real ones → ids [B, T, K] and probabilities [B, T, K].

        Padding has a label like any other, of one token, so that no loss has to look out for it.
        """
        positions = positions.clamp(max=len(self.ids) - 1)
        ids, real = self.ids.gather(positions)
        entries, _ = self.ids.positions(positions)
        weights = self.weights[entries.clamp(max=len(self.weights) - 1)] * (real & mask[..., None])
        weights[..., 0].masked_fill_(~mask, 1)  # a loss that divides by a label's sum finds one at padding
        if weights.is_floating_point():
            return ids, weights
        return ids, weights / weights.sum(-1, keepdim=True).clamp(min=1)


def likeliest(logits: Tensor, k: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [M, V] → the k most likely tokens [M, k] and their probabilities [M, k]; k = 0: all tokens."""
    vocabulary = logits.shape[-1]
    weights, ids = logits.float().softmax(-1).topk(k if 0 < k < vocabulary else vocabulary, dim=-1)
    return ids, weights


@dataclass
class Examples:
    """What `fit` trains on: N prompts, N answers, mostly with stop token, and a soft label for each token."""

    prompts: Ragged
    answers: Ragged
    labels: SoftLabels  # one row per token of answers.values
    inputs: Ragged | None = None  # the raw inputs x of practice, as UTF-8; None where they are not known

    @classmethod
    def hard(cls, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Examples:
        """Plain supervised examples: the answer's own tokens are the labels, its stop token, too."""
        ragged = Ragged.of(answers)
        return cls(Ragged.of(prompts), ragged, SoftLabels.one_hot(ragged.values))

    @classmethod
    def none(cls) -> Examples:
        return replace(cls.hard([], []), inputs=Ragged.of_texts([]))

    @classmethod
    def join(cls, parts: Sequence[Examples]) -> Examples:
        inputs = None if any(p.inputs is None for p in parts) else Ragged.join([p.inputs for p in parts])
        return cls(Ragged.join([p.prompts for p in parts]), Ragged.join([p.answers for p in parts]),
                   SoftLabels.join([p.labels for p in parts]), inputs)

    def __len__(self) -> int:
        return len(self.prompts)

    def input(self, i: int) -> str:
        """The raw input x of row i. Raises ValueError where the examples lack them."""
        if self.inputs is None:
            raise ValueError("these examples do not hold their raw inputs")
        return bytes(self.inputs[i]).decode()

    @property
    def digest(self) -> int:
        """A checksum of all but the inputs: a run resumes only on the examples that it began with."""
        fields = (self.prompts.values, self.prompts.starts, self.answers.values, self.answers.starts,
                  self.labels.ids.values, self.labels.ids.starts, self.labels.weights)
        return functools.reduce(lambda crc, field: zlib.crc32(field.contiguous().numpy(), crc), fields, 0)

    def batch(self, rows: Tensor, pad: int = 0) -> tuple[Tensor, LabelBatch]:
        """Rows [B] → prompts [B, S], padded with `pad`, and labels of their answers, padded with zeros."""
        prompts, _ = self.prompts.gather(rows, pad)
        tokens, mask = self.answers.gather(rows)
        positions, _ = self.answers.positions(rows)
        return prompts, LabelBatch(tokens, *self.labels.gather(positions, mask), mask)

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write one safetensors file, atomically."""
        tensors = {"prompts.values": self.prompts.values, "prompts.starts": self.prompts.starts,
                   "answers.values": self.answers.values, "answers.starts": self.answers.starts,
                   "labels.ids": self.labels.ids.values, "labels.starts": self.labels.ids.starts,
                   "labels.weights": self.labels.weights}
        if self.inputs is not None:
            tensors |= {"inputs.values": self.inputs.values, "inputs.starts": self.inputs.starts}
        atomic_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path) -> Examples:
        """Raises ValueError where the file is damaged or not a practice set."""
        problem = "is damaged, or not a practice set"
        with open_safetensors(path, problem, "delete it to practise anew") as file:
            t = all_tensors(file)
            check_practice_set(t)
            prompts, answers = (Ragged(t[f"{k}.values"], t[f"{k}.starts"]) for k in ("prompts", "answers"))
            inputs = Ragged(t["inputs.values"], t["inputs.starts"]) if "inputs.values" in t else None
            labels = SoftLabels(Ragged(t["labels.ids"], t["labels.starts"]), t["labels.weights"])
        return cls(prompts, answers, labels, inputs)

    def check(self, vocabulary: int, longest: float) -> None:
        """Raises ValueError where there are none, a prompt or all answers are empty, a row has too many
        tokens for the model, or a token id is outside its vocabulary: then it has another tokenizer.
        """
        if not len(self) or not len(self.answers.values):
            raise ValueError("there is nothing to train on" + ": all answers are empty" * bool(len(self)))
        if not int(self.prompts.lengths.min()):
            raise ValueError(f"the prompt of row {int(self.prompts.lengths.argmin())} is empty")
        lengths = self.prompts.lengths + self.answers.lengths
        if lengths.max() > longest:
            raise ValueError(f"row {int(lengths.argmax())} has a prompt and answer of {int(lengths.max())} "
                             f"tokens, the model only {longest} positions")
        for values in (self.prompts.values, self.answers.values, self.labels.ids.values):
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < vocabulary:
                raise ValueError(
                    f"the practice set holds token ids from {values.min()} to {values.max()}, the model's go "
                    f"from 0 to {vocabulary - 1}: their tokenizers differ, or the practice set is damaged")
