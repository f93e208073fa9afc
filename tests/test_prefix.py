"""What all prompts of a batch begin with is read once, and changes nothing."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from test_checkpoint import FIXTURES

from minicd import decoder
from minicd.decoder import SHARED_FROM, Decoder, common_length
from minicd.distill import distill
from minicd.hf.checkpoint import load
from minicd.labels import Examples
from minicd.layers import attend
from minicd.runtime.lean import checkpointed_blocks
from minicd.runtime.lora import adapters
from minicd.sampling import generate, score
from minicd.training import FitSettings, set_dropout

DECODERS = ["gpt2", "xglm", "llama", "llama-bias", "qwen2", "qwen3"]  # grouped heads, learned and rotary positions


@pytest.fixture(params=DECODERS)
def model(request) -> Decoder:
    return load(FIXTURES / request.param)[0]


def prompts(model: Decoder) -> list[list[int]]:
    """Twenty common tokens, then one to six of their own."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> list[int]:
        return torch.randint(3, model.config.vocab_size, (n,), generator=generator).tolist()
    common = draw(20)
    return [common + draw(n) for n in (3, 1, 6, 4)]


class Reads:
    """How many tokens every pass through the model reads."""

    def __init__(self, monkeypatch):
        self.sizes, real = [], Decoder.run

        def run(model, tokens, *how):
            self.sizes.append(tokens.numel())
            return real(model, tokens, *how)
        monkeypatch.setattr(Decoder, "run", run)


def test_a_row_of_a_batch_is_the_row_alone(model, monkeypatch):
    rows, reads = prompts(model), Reads(monkeypatch)
    together = generate(model, rows, 8, temperature=0)
    assert reads.sizes == [20, 4 * 6]  # the common tokens once, then what the rows have of their own
    assert together == [generate(model, [row], 8, temperature=0)[0] for row in rows]

    answers = [[5, 6, 7], [8], [9, 10, 11, 12], [5, 5]]
    reads.sizes.clear()
    scored = score(model, rows, answers)
    assert reads.sizes == [20, 4 * (6 + 3)]
    for row, answer, logits in zip(rows, answers, scored):
        alone = score(model, [row], [answer])[0]
        assert (logits - alone).abs().max() < 1e-5 * logits.abs().max()


WAYS = {"plain": lambda model: nullcontext(), "checkpointing": lambda model: checkpointed_blocks(model, True),
        "adapters": lambda model: adapters(model, 2, 0), "bf16": lambda model: torch.autocast("cpu", torch.bfloat16)}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_all_rows_meet_in_what_they_share(model, monkeypatch, way):
    rows, answers = padded(prompts(model)), padded([[5, 6, 7], [8], [9, 10, 11, 12], [5, 5]])
    set_dropout(model.train(), 0.0)
    reads = Reads(monkeypatch)
    monkeypatch.setattr(decoder, "SAVED_FROM", 3 * 20)

    def gradients() -> dict[str, torch.Tensor]:
        reads.sizes.clear()
        with WAYS[way](model):
            model.zero_grad()
            logits = model(rows, answers).float()
            (logits.log_softmax(-1)[..., 5] * (answers >= 0)).sum().backward()
            return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    shared = gradients()
    assert reads.sizes == [20, 4 * (6 + 3)]
    monkeypatch.setattr(decoder, "common_length", lambda prompts: 0)
    apart = gradients()
    assert reads.sizes == [4 * (26 + 3)] and shared.keys() == apart.keys()
    limit = 0.3 if way == "bf16" else 1e-4  # of all of a parameter's gradient
    for name, wanted in apart.items():
        assert (shared[name] - wanted).norm() < limit * wanted.norm() + 1e-6, name


def test_a_student_is_the_same_whether_its_batches_share_or_not(model, monkeypatch):
    """In micro-batches of two, whose beginnings are shared batch by batch."""
    examples = Examples.hard(prompts(model), [[5, 6, 7], [8], [9, 10, 11, 12], [5, 5]])
    how = FitSettings(lr=1e-3, batch_size=4, micro_batch=2, loss="hard", precision="fp32", dropout=0.0)
    monkeypatch.setattr(decoder, "SAVED_FROM", 20)
    students, reads = [deepcopy(model), deepcopy(model)], Reads(monkeypatch)
    distill(students[0], examples, how, epochs=4)
    assert reads.sizes[::2] == [20] * 4 * 2  # steps, micro-batches
    monkeypatch.setattr(decoder, "common_length", lambda prompts: 0)
    distill(students[1], examples, how, epochs=4)
    rows = examples.batch(torch.arange(4), -1)
    with torch.no_grad():
        shared, apart, before = (each(rows[0], rows[1].tokens)[rows[1].mask] for each in (*students, model))
    assert (shared - apart).norm() < 0.01 * (apart - before).norm()


@pytest.mark.parametrize("dropout, saved_from", [(0.1, 0), (0.0, 3 * 20 + 1)])
def test_with_dropout_or_little_to_save_every_row_is_read(model, monkeypatch, dropout, saved_from):
    """The masks of dropout differ from row to row."""
    rows, reads = padded(prompts(model)), Reads(monkeypatch)
    monkeypatch.setattr(decoder, "SAVED_FROM", saved_from)
    set_dropout(model.train(), dropout)
    model(rows, torch.tensor([[5]] * 4))
    assert reads.sizes == [4 * 26]


def padded(rows: list[list[int]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


def test_how_much_is_common():
    common = list(range(1, SHARED_FROM + 1))
    assert common_length(torch.tensor([[*common, 50, 51], [*common, 60, -1]])) == SHARED_FROM
    assert common_length(torch.tensor([[*common, 50], [*common, -1]])) == 0  # a prompt keeps its last token for itself
    assert common_length(torch.tensor([[*common[1:], 50], [*common[1:], 60]])) == 0  # too little to pay
    assert common_length(torch.tensor([[*common, 50]])) == 0  # one row alone
    assert common_length(torch.tensor([[7, *common], [8, *common]])) == 0


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("queries", [1, 5])
def test_attention_with_a_prefix_is_attention_to_both(heads, kv_heads, queries):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, heads, queries, 8), (3, kv_heads, 7, 8), (3, kv_heads, 7, 8), (3, 1, queries, 7), (1, kv_heads, 6, 8),
              (1, kv_heads, 6, 8)]
    q, k, v, bias, prefix_k, prefix_v = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    bias[..., 2] = -torch.inf
    found = attend(q, k, v, bias, 0.3, (prefix_k, prefix_v))
    both = [torch.cat([first.expand(3, -1, -1, -1), own], 2) for first, own in ((prefix_k, k), (prefix_v, v))]
    wanted = attend(q, *both, torch.nn.functional.pad(bias, (6, 0)), 0.3)
    assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
def test_rows_read_a_few_at_a_time_are_the_rows_read_together(model, shared, monkeypatch):
    rows = prompts(model) if shared else [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 5], [6]]
    answers = [[5, 6, 7], [8], [9, 10, 11, 12], [5, 5], [7]][: len(rows)]
    together = generate(model, rows, 8, temperature=0), score(model, rows, answers)
    reads, real = [], Decoder.run_rows

    def run_rows(model, tokens, *how):
        reads.append(len(tokens))
        return real(model, tokens, *how)
    monkeypatch.setattr(Decoder, "run_rows", run_rows)
    monkeypatch.setattr(decoder, "READ_AT_ONCE", 2 * (6 if shared else 5))  # two rows of a prompt
    assert generate(model, rows, 8, temperature=0) == together[0]
    assert reads == ([1, 2, 2] if shared else [2, 2, 1])
    for one, other in zip(score(model, rows, answers), together[1]):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
