"""What a run is said to need before it starts is what it needs, and the flag that is named helps."""

from pathlib import Path

import pytest
import torch
from bench.labels import cpu_peak
from helpers import tiny_decoder, tiny_t5

from minicd.distill import PracticeSettings
from minicd.hf.checkpoint import load
from minicd.labels import Examples, Ragged, SoftLabels
from minicd.runtime import estimate
from minicd.runtime.estimate import Batch, Plan, free_disk, free_in_container, size, training, what_it_needs
from minicd.sampling import generate
from minicd.training import FitSettings, fit

ROOT, CPU = Path(__file__).resolve().parent.parent, torch.device("cpu")
PLAIN = {"positions": "learned", "norm": "layer", "activation": "gelu_new", "gated": False, "num_kv_heads": 8}
SMALL = {"vocab_size": 512, "d_model": 64, "num_layers": 3, "num_heads": 8, "num_kv_heads": 4, "d_kv": 8, "d_ff": 172}
MODELS = {"pocket T5": lambda: load(ROOT / "data" / "pocket")[0], "small Llama": lambda: tiny_decoder(**SMALL),
          "small GPT-2": lambda: tiny_decoder(**SMALL | PLAIN)}


class Same:
    """One batch, again and again."""

    def __init__(self, model, batch: Batch, kind: str, steps: int):
        generator, vocab = torch.Generator().manual_seed(0), model.config.vocab_size
        rows = [torch.randint(3, vocab, (batch.rows, n), generator=generator).tolist() for n in (batch.prompt, batch.answer)]
        logits = 3 * torch.randn(batch.rows * batch.answer, vocab, generator=generator)
        labels = {"sampled": lambda: SoftLabels.sample(logits, 100, generator), "top": lambda: SoftLabels.top(logits, 16),
                  "exact": lambda: SoftLabels.top(logits)}[kind]()
        examples = Examples(Ragged.of(rows[0]), Ragged.of(rows[1]), labels)
        self.batch, self.steps = examples.batch(torch.arange(batch.rows), model.config.pad_token_id), steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int):
        return self.batch


def ratio(model, batch: Batch, kind: str = "sampled", steps: int = 2, **how) -> float:
    """Estimated ÷ measured bytes at the peak of training, the teacher's weights among them."""
    settings, batches = FitSettings(**{"precision": "fp32"} | how), Same(model, batch, kind, steps)
    labels = batches.batch[1]
    need = training(model, batch, settings, CPU, labels.ids.shape[-1])
    weights = sum(p.nbytes for p in model.parameters())
    held = weights * (1 if settings.lora_rank else 2) + labels.ids.nbytes + labels.weights.nbytes
    return need["peak"] / (held + cpu_peak(lambda: fit(model, batches, settings, name="")))


@pytest.mark.parametrize("how", [{}, {"checkpointing": True}, {"micro_batch": 4}, {"lora_rank": 4}, {"optimiser": "muon"},
                                 {"dropout": 0.1}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_training_peak_is_within_a_quarter_of_the_measured_one(name, how):
    assert 0.75 < ratio(MODELS[name](), Batch(16, 40, 12), **how) < 1.25


@pytest.mark.parametrize("how", [{}, {"micro_batch": 4}, {"lora_rank": 4}, {"optimiser": "muon"}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_so_it_is_with_weights_of_half_precision(name, how):
    model = MODELS[name]().bfloat16()
    assert 0.75 < ratio(model, Batch(16, 40, 12), precision="bf16-weights", **how) < 1.25


@pytest.mark.parametrize("loss, kind", [("topk", "top"), ("exact", "exact"), ("jsd", "exact")])
def test_so_it_is_with_losses_that_copy_the_logits(loss, kind):
    assert 0.75 < ratio(MODELS["small Llama"](), Batch(16, 20, 60), kind, loss=loss) < 1.25


@pytest.mark.parametrize("how", [{}, {"lora_rank": 8, "checkpointing": True}], ids=str)
def test_so_it_is_with_sixty_million_parameters(how):
    model = tiny_decoder(vocab_size=32768, d_model=512, num_layers=10, num_heads=8, num_kv_heads=4, d_kv=64, d_ff=2048)
    assert 55e6 < sum(p.numel() for p in model.parameters()) < 65e6
    assert 0.75 < ratio(model, Batch(4, 24, 16), **how) < 1.25


def test_logits_by_parts_are_counted_by_parts(monkeypatch):
    """More would be several times as much."""
    batch = Batch(32, 10, 60)
    model = tiny_decoder(vocab_size=4096)
    whole = ratio(model, batch)
    monkeypatch.setattr("minicd.runtime.lean.LOGITS_AT_ONCE", 2**20)
    monkeypatch.setattr("minicd.runtime.lean.PART", 2**18)
    monkeypatch.setattr(estimate, "LOGITS_AT_ONCE", 2**20)
    monkeypatch.setattr(estimate, "PART", 2**18)
    assert 0.75 < whole < 1.25 and 0.75 < ratio(model, batch) < 1.25


@pytest.mark.parametrize("name", MODELS)
def test_practice_needs_at_most_what_is_said(name):
    model, batch, settings = MODELS[name](), Batch(32, 20, 40, 50), PracticeSettings(max_new_tokens=40, precision="fp32")
    plan = Plan(model, batch, FitSettings(precision="fp32"), settings, 64, CPU)
    model.config.eos_token_id = -1  # all completions are as long as they may be
    def pick(logits):
        return logits.argmax(-1), torch.zeros(len(logits), settings.label_samples, dtype=torch.int32)
    peak = 2 * sum(p.nbytes for p in model.parameters()) + cpu_peak(
        lambda: generate(model, [[3 + i % 7] * 50 for i in range(64)], 40, pick=pick))
    assert 0.5 * plan.practising() < peak < 1.25 * plan.practising()


def test_where_it_does_not_fit_the_flag_that_helps_is_named(monkeypatch, tmp_path):
    model = tiny_t5(64)
    plan = Plan(model, Batch(512, 100, 100, 200), FitSettings(precision="fp32"), PracticeSettings(chunk=8), 1000, CPU)
    flags = ["--micro-batch", "--checkpointing", "--lora-rank", "--chunk"]
    assert free_disk(tmp_path / "not" / "yet") > 0
    for free in ("free_memory", "free_disk"):
        monkeypatch.setattr(estimate, free, lambda of: 2**40)
    assert len(what_it_needs(plan, tmp_path / "not" / "yet", flags).splitlines()) == 1
    monkeypatch.setattr(estimate, "free_memory", lambda device: 2**20)
    assert "--micro-batch 1, with which" in what_it_needs(plan, tmp_path, flags).splitlines()[1]
    assert "--micro-batch" not in what_it_needs(plan, tmp_path, flags[1:])
    plan.batch.rows, plan.practice.chunk, plan.practice.max_new_tokens = 1, 100_000, 100
    plan.items = 100_000
    assert "--chunk 64, with which" in what_it_needs(plan, tmp_path, flags).splitlines()[1]
    assert "--jobs 1, with which" in what_it_needs(plan, tmp_path, [], jobs=2).splitlines()[1]
    monkeypatch.setattr(estimate, "free_disk", lambda folder: 2**20)
    assert "--labels top" in what_it_needs(plan, tmp_path, flags).splitlines()[2]


def test_sizes_are_readable():
    assert [size(n) for n in (100, 3 * 2**19, 2**20 * 100, 1.5 * 2**30)] == ["0.1 KiB", "1.5 MiB", "100 MiB", "1.5 GiB"]


@pytest.mark.parametrize("files, left", [
    ({}, []), ({"max": "max\n", "current": "5\n"}, []), ({"max": "100\n"}, [100]), ({"max": "100\n", "current": "70\n"}, [30]),
    ({"max": "100\n", "current": "70\n", "stat": "anon 20\ninactive_file 45\nactive_file 5\n"}, [75])])
def test_a_containers_limit_counts_what_programs_use(files, left, tmp_path):
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_in_container(tmp_path) == left
