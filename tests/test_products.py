"""Faster training on the CPU: the same numbers as by plain autograd, and a choice of products that a resume keeps."""

import copy

import pytest
import torch
from helpers import tiny_t5
from test_training import Batches, interrupted_at, same_weights, settings, starting_model

from minicd import training
from minicd.losses import GatherAndLogSumExp
from minicd.runtime import fused, products
from minicd.runtime.fused import Rotation, parts
from minicd.runtime.products import chosen_products, fastest

EVERY_CHOICE = [[a, b, c] for a in (False, True) for b in (False, True) for c in (False, True)]
onednn = pytest.mark.skipif(not products.can_pack(), reason="this PyTorch lacks the operators")


def numbers(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("part", [1, 40, 10**6])
def test_parts_are_all_rows_in_order(part, monkeypatch):
    monkeypatch.setattr(fused, "PART", part)
    a, b = numbers(7, 5, 2), numbers(7, 1)
    pieces = list(parts(a, b))
    assert torch.equal(torch.cat([x for x, _ in pieces]), a) and torch.equal(torch.cat([y for _, y in pieces]), b)
    assert len(pieces) == {1: 7, 40: 2, 10**6: 1}[part]


@pytest.mark.parametrize("part", [1, 10**6])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_rotation_has_autograds_gradient(dtype, tolerance, part, monkeypatch):
    monkeypatch.setattr(fused, "PART", part)
    x, upstream = numbers(3, 5, 4, 8, dtype=dtype).transpose(1, 2), numbers(3, 4, 5, 8, dtype=dtype)
    angle = numbers(3, 1, 5, 4)

    def plain(x):
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).to(x.dtype)
    results = []
    for function in (plain, lambda x: Rotation.apply(x, angle.cos(), angle.sin())):
        leaf = x.detach().requires_grad_()
        y = function(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, upstream)))
    for expected, found in zip(*results):
        assert found.dtype == dtype and torch.allclose(expected.float(), found.float(), atol=tolerance)


@pytest.mark.parametrize("part", [1, 40, 10**6])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_loss_in_parts_has_autograds_gradient(dtype, tolerance, part, monkeypatch):
    monkeypatch.setattr(fused, "PART", part)
    logits, ids = numbers(3, 5, 11, dtype=dtype), torch.randint(11, (3, 5, 2), generator=torch.Generator().manual_seed(0))

    def plain(logits, ids):
        z = logits.double()
        return z.gather(-1, ids), z.logsumexp(-1)
    results = []
    for function in (plain, GatherAndLogSumExp.apply):
        leaf = logits.detach().requires_grad_()
        z, logsumexp = function(leaf, ids)
        (logsumexp.sin().sum() - (z * z.detach().cos()).sum()).backward()
        results.append((logsumexp, leaf.grad))
    for expected, found in zip(*results):
        assert torch.allclose(expected.double(), found.double(), atol=tolerance)


def gradients(model, choice: list[bool]) -> tuple[list[torch.Tensor], torch.Tensor]:
    tokens = torch.arange(2, 14).view(3, 4)
    with chosen_products(model, choice):
        logits = model(tokens, tokens.flip(0))
    return torch.autograd.grad(logits.log_softmax(-1)[..., 3].sum(), list(model.parameters())), logits


@onednn
@pytest.mark.parametrize("choice", EVERY_CHOICE)
@pytest.mark.parametrize("tied", [False, True])
def test_every_choice_of_products_has_the_same_gradients(choice, tied):
    model = tiny_t5(tie_word_embeddings=tied)
    (expected, logits), (found, others) = gradients(model, []), gradients(model, choice)
    assert torch.allclose(logits, others, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(expected, found))


@onednn
def test_the_products_are_as_before_outside(tmp_path):
    model = tiny_t5()
    with pytest.raises(KeyboardInterrupt), chosen_products(model, [True] * 3):
        assert "forward" in vars(model.lm_head)
        raise KeyboardInterrupt
    assert not any({"forward", "head"} & vars(module).keys() for module in model.modules())
    copy.deepcopy(model)


def test_small_models_and_bf16_have_no_choice(monkeypatch):
    assert fastest(tiny_t5(), 8) == []
    monkeypatch.setattr(products, "LARGE", 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastest(tiny_t5(), 8) == []


@onednn
def test_the_choice_is_measured_for_each_product(monkeypatch):
    monkeypatch.setattr(products, "LARGE", 1)
    seen = []
    monkeypatch.setattr(products, "faster", lambda a, b: seen.append((a.shape, b.shape)) or len(seen) == 2)
    assert fastest(tiny_t5(), 8) == [False, True, False]
    assert [(a[-1] == b[-1], a[0] * b[0]) for a, b in seen] == [(True, 8 * 64), (True, 8 * 16), (True, 64 * 16)]


def test_a_run_that_goes_on_where_there_is_no_choice_does_not_use_the_old_one(monkeypatch, tmp_path):
    """It began in fp32 on a CPU, and goes on in bf16 there, or on CUDA."""
    path, asked = tmp_path / "progress.safetensors", []
    monkeypatch.setattr(training, "fastest", lambda model, rows: asked.append(1) or [])
    with pytest.raises(KeyboardInterrupt):
        training.fit(starting_model(), interrupted_at(33), settings(), checkpoint=path, save_every=0)
    monkeypatch.setattr(training, "in_bf16", lambda device, precision: True)
    training.fit(starting_model(), Batches(), settings(), checkpoint=path, save_every=0)
    assert len(asked) == 2


@onednn
def test_a_resumed_run_keeps_its_choice(monkeypatch, tmp_path):
    """Even where another is measured now; else it would not be the unbroken run bit for bit."""
    monkeypatch.setattr(training, "fastest", lambda model, rows: [True, True, True])
    unbroken, path = starting_model(), tmp_path / "progress.safetensors"
    history = training.fit(unbroken, Batches(), settings())
    with pytest.raises(KeyboardInterrupt):
        training.fit(starting_model(), interrupted_at(33), settings(), checkpoint=path, save_every=0)
    monkeypatch.setattr(training, "fastest", lambda model, rows: pytest.fail("measured anew"))
    resumed = starting_model()
    assert training.fit(resumed, Batches(), settings(), checkpoint=path, save_every=0) == history
    assert same_weights(resumed, unbroken)
