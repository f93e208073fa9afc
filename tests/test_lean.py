"""Training in less memory: the same numbers with adapters, small batches, logits by parts, blocks computed twice."""

from copy import deepcopy

import pytest
import torch
from helpers import tiny_decoder, tiny_t5

import minicd.runtime.lean as lean
from minicd.distill import Context, PracticeSettings, distill, identity
from minicd.labels import Examples, Ragged, SoftLabels
from minicd.losses import LOSSES, find_loss
from minicd.rounds import RoundSettings, rounds
from minicd.runtime.lora import LowRank, adapters, copy_to_train
from minicd.training import FitSettings, Run
from minicd.tokenizer import word_tokenizer

MODELS = {"t5": tiny_t5, "decoder": tiny_decoder}


def items(vocab: int, kind: str = "sampled", n: int = 8) -> Examples:
    generator = torch.Generator().manual_seed(1)
    lengths = [1 + i % 5 for i in range(n)]
    rows = [torch.randint(3, vocab, (k,), generator=generator).tolist() for k in lengths]
    logits = torch.randn(sum(lengths), vocab, generator=generator)
    labels = {"sampled": lambda: SoftLabels.sample(logits, 20, generator), "exact": lambda: SoftLabels.top(logits, 0),
              "top": lambda: SoftLabels.top(logits, 4)}[kind]()
    return Examples(Ragged.of([row + [3] for row in rows]), Ragged.of(rows), labels)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def trained(model, examples, **settings):
    student = copy_to_train(model, settings.get("lora_rank", 0))
    losses = distill(student, examples, FitSettings(lr=1e-2, batch_size=4, precision="fp32", dropout=0.0, **settings), epochs=4)
    return student, losses


def mean_loss(model, examples) -> float:
    prompts, labels = examples.batch(torch.arange(len(examples)), model.config.pad_token_id)
    with torch.no_grad():
        return find_loss("empirical")(model(prompts, labels.tokens), labels)[labels.mask].mean().item()


def same(one, other):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("how", [{"micro_batch": 1}, {"micro_batch": 3}, {"checkpointing": True}])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_same_student_with_logits_by_parts(model, how, rank, monkeypatch):
    """Together with what else saves memory."""
    examples = items(model.config.vocab_size)
    usual, losses = trained(model, examples, lora_rank=rank)
    monkeypatch.setattr(lean, "LOGITS_AT_ONCE", 0)
    monkeypatch.setattr(lean, "PART", 3 * model.config.vocab_size)
    by_parts, lean_losses = trained(model, examples, lora_rank=rank, **how)
    same(usual, by_parts)
    assert lean_losses == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("how", [{"micro_batch": 1}, {"micro_batch": 3}, {"checkpointing": True}])
def test_the_same_student_in_less_memory(model, how):
    examples = items(model.config.vocab_size)
    (usual, losses), (lean_one, lean_losses) = trained(model, examples), trained(model, examples, **how)
    same(usual, lean_one)
    assert lean_losses == pytest.approx(losses, rel=1e-4)


def test_the_cpu_takes_wide_batches_in_even_parts(model, monkeypatch):
    examples, seen = items(model.config.vocab_size), []
    usual, losses = trained(model, examples)
    config, backward = model.config, Run.backward
    one_row = 10 * config.d_model * config.num_layers  # prompts of 6 tokens and answers of 5, at most
    monkeypatch.setattr(lean, "TRAIN_AT_ONCE", 3 * one_row)
    assert lean.rows_together(config, 4, 10, torch.device("cpu")) == 2
    assert lean.rows_together(config, 3, 10, torch.device("cpu")) == 3 and lean.rows_together(config, 9, 10, torch.device("cpu")) == 3
    assert lean.rows_together(config, 2, 99, torch.device("cpu")) == 1 and lean.rows_together(config, 9, 10, torch.device("cuda")) == 9
    monkeypatch.setattr(Run, "backward", lambda self, prompts, *rest: seen.append(len(prompts)) or backward(self, prompts, *rest))
    in_parts, part_losses = trained(model, examples)
    assert set(seen) <= {2, 4} and 2 in seen
    same(usual, in_parts)
    assert part_losses == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_any_loss_by_parts(model, name, monkeypatch):
    kind = {"any": "sampled"}.get(LOSSES[name].labels, LOSSES[name].labels)
    examples, seen = items(model.config.vocab_size, kind), []
    prompts, labels = examples.batch(torch.arange(8), model.config.pad_token_id)

    def gradients():
        model.zero_grad()
        per_token = lean.loss_per_token(model, prompts, labels, find_loss(name))
        per_token.masked_fill(~labels.mask, 0.0).sum().backward()
        return per_token.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    whole, gradient = gradients()
    head = type(model).head
    monkeypatch.setattr(type(model), "head", lambda self, x: seen.append(x.shape[:-1].numel()) or head(self, x))
    monkeypatch.setattr(lean, "LOGITS_AT_ONCE", 12 * model.config.vocab_size)
    monkeypatch.setattr(lean, "PART", 3 * model.config.vocab_size)
    parts, by_parts = gradients()
    assert max(seen) == 3 and "head" not in vars(model)
    torch.testing.assert_close(parts[labels.mask], whole[labels.mask])
    for name in gradient:
        torch.testing.assert_close(by_parts[name], gradient[name], msg=name)


def test_adapters_start_at_the_model_and_are_merged(model):
    examples, before = items(model.config.vocab_size), deepcopy(model)
    prompts, labels = examples.batch(torch.arange(8), model.config.pad_token_id)
    with torch.no_grad(), adapters(copy := copy_to_train(model, 2), 2, seed=0):
        assert any(isinstance(m, LowRank) for m in copy.modules())
        torch.testing.assert_close(copy(prompts, labels.tokens), model(prompts, labels.tokens))
    same(copy, model)
    student, _ = trained(model, examples, lora_rank=2)
    assert mean_loss(student, examples) < mean_loss(model, examples) - 0.1
    assert [n for n, _ in student.named_parameters()] == [n for n, _ in model.named_parameters()]
    for (name, new), old, kept in zip(student.named_parameters(), model.parameters(), before.parameters()):
        assert torch.equal(old, kept) and old.requires_grad, f"{name}: the teacher has changed"
        inside = "blocks." in name and new.ndim == 2 and "relative" not in name
        assert torch.equal(new, old) != inside, name
        if inside:
            assert torch.linalg.matrix_rank(new - old, atol=1e-6) <= 2, name


def test_adapters_are_merged_where_training_is_interrupted(model):
    before = deepcopy(model)
    with pytest.raises(KeyboardInterrupt):
        with adapters(copy := copy_to_train(model, 2), 2, seed=0):
            for name, parameter in copy.named_parameters():
                if parameter.requires_grad:
                    parameter.data.normal_()
            raise KeyboardInterrupt
    assert not any(isinstance(m, LowRank) for m in copy.modules()) and all(p.requires_grad for p in copy.parameters())
    assert [n for n, _ in copy.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(copy.parameters(), model.parameters()))
    same(model, before)


def test_only_the_adapters_have_gradients_and_states():
    model = tiny_decoder()
    with adapters(copy := copy_to_train(model, 1), 1, seed=0):
        learning = [name for name, p in copy.named_parameters() if p.requires_grad]
        assert learning and all("lora" in name for name in learning)
        shared = {p.data_ptr() for p in model.parameters()}
        assert all(p.data_ptr() in shared for name, p in copy.named_parameters() if "lora" not in name)


@pytest.mark.parametrize("on_policy", [False, True])
def test_rounds_with_adapters_leave_the_teacher_and_resume(tmp_path, on_policy):
    model, tokenizer = tiny_decoder(), word_tokenizer([f"w{i}" for i in range(tiny_decoder().config.vocab_size - 3)])
    model.config.eos_token_id = tokenizer.eos_id
    before = deepcopy(model)
    context = Context(lambda n, rng: [f"w{rng.integers(9)}" for _ in range(n)], lambda x: f"w1 {x}", lambda x: x, identity)
    settings = RoundSettings(PracticeSettings("exact" if on_policy else "sampled", max_new_tokens=4, precision="fp32"),
                             FitSettings(lr=1e-2, batch_size=4, lora_rank=2, precision="fp32",
                                         loss="reverse" if on_policy else "empirical"), items=8, on_policy=on_policy)
    schedule = [[context], [context]]
    students = [rounds(model, tokenizer, schedule, settings, folder=tmp_path) for _ in range(2)]
    same(model, before)
    assert not torch.equal(students[0].blocks[0].attention.o.weight, model.blocks[0].attention.o.weight)
    for a, b in zip(students[0].parameters(), students[1].parameters()):
        assert torch.equal(a, b)
