"""bf16 weights with fp32 masters: no step is lost, and all else is as with weights of fp32."""

from copy import deepcopy

import pytest
import torch
from helpers import tiny_decoder, tiny_t5
from test_training import CHECK_EVERY, STEPS, Batches, interrupted_at, same_weights, settings

from minicd.runtime.half import Working
from minicd.runtime.lora import adapters, copy_to_train
from minicd.sampling import generate
from minicd.tasks.folder import RunFolder
from minicd.tasks.own import Own, OwnSettings
from minicd.training import Run, fit

HALF, MODELS = "bf16-weights", {"t5": tiny_t5, "decoder": tiny_decoder}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def types(model) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters()}


def test_steps_that_bf16_cannot_tell_apart_add_up():
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    half = Working(layer, half=True)
    for _ in range(100):
        half.model.weight.grad = torch.full((1, 1), -1e-3, dtype=torch.bfloat16)
        half.hand_over()
        layer.weight.data.sub_(layer.weight.grad)
        layer.weight.grad = None
        half.follow()
    assert layer.weight.item() == pytest.approx(1.1, rel=1e-2)
    assert half.model.weight.item() == pytest.approx(1.1, rel=1e-2)  # bf16 has nothing between 1 and 1.0078


def test_gradients_of_small_batches_are_summed_in_fp32():
    layer = torch.nn.Linear(1, 1, bias=False)
    half = Working(layer, half=True)
    for part in [1.0] + [1e-3] * 100:
        half.model.weight.grad = torch.full((1, 1), part, dtype=torch.bfloat16)
        half.hand_over()
    assert layer.weight.grad.item() == pytest.approx(1.1, rel=1e-2) and half.model.weight.grad is None


def test_what_computes_is_bf16_and_what_learns_is_fp32(model):
    run = Run(model, settings(precision=HALF), 1, 0, None)
    run.update(*Batches()[0])
    assert types(run.working.model) == {torch.bfloat16} and types(run.model) == {torch.float32} and run.model is model
    for half, master in zip(run.working.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(half, master.bfloat16())


@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16])
def test_it_learns_as_with_weights_of_fp32(model, start):
    usual, half = deepcopy(model), model.to(start)
    expected, got = fit(usual, Batches(), settings()), fit(half, Batches(), settings(precision=HALF))
    assert got == pytest.approx(expected, rel=0.1) and types(half) == {torch.float32}


def test_small_batches_make_the_same_student(model):
    usual, small = deepcopy(model), model
    expected = fit(usual, Batches(CHECK_EVERY), settings(precision=HALF))
    assert fit(small, Batches(CHECK_EVERY), settings(precision=HALF, micro_batch=3)) == pytest.approx(expected, rel=0.02)


def test_resume_is_bit_exact(tmp_path):
    how, unbroken = settings(precision=HALF, clip=1.0), tiny_decoder()
    history, path = fit(unbroken, Batches(), how), tmp_path / "progress.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_decoder(), interrupted_at(33), how, checkpoint=path, save_every=0)
    resumed, batches = tiny_decoder().bfloat16(), Batches()
    assert fit(resumed, batches, how, checkpoint=path, save_every=0) == history
    assert batches.asked == list(range(33, STEPS)) and same_weights(resumed, unbroken)


def test_adapters_share_the_weights_that_stay(model):
    teacher = model.bfloat16()
    before, student = deepcopy(teacher), copy_to_train(teacher, rank=2)
    history = fit(student, Batches(), settings(precision=HALF, lora_rank=2, lr=1e-2))
    assert history[-1] < history[0] and same_weights(teacher, before) and not same_weights(student, before)
    prompts, labels = Batches()[0]
    with torch.no_grad():
        assert student(prompts, labels.tokens).dtype == torch.bfloat16  # all weights fit together


def test_a_student_with_adapters_answers_while_it_trains(model):
    """As on policy, without autocast: its masters are of another precision than the weights that stay."""
    with adapters(student := model.bfloat16(), 2, seed=0):
        masters = [p for name, p in student.named_parameters() if "lora" in name]
        for parameter in masters:
            parameter.data = parameter.data.float()
        assert masters and len(generate(student, [[1, 2, 3]], 4, precision=None)) == 1


def test_the_teacher_of_a_run_has_weights_of_half_precision(tmp_path):
    chosen = OwnSettings(precision=HALF, contexts="data/contexts/instruction.toml")
    found = Own(chosen, 0, RunFolder(tmp_path, torch.device("cpu"))).base
    assert torch.bfloat16 in types(found)
