"""The decoder against what Hugging Face transformers computed (fixtures/make_decoder.py), and against itself."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from minicd.hf import checkpoint
from minicd.decoder import Decoder, frequencies, rotate, sinusoids
from minicd.sampling import generate

FIXTURES = Path(__file__).parent / "fixtures"
# gpt2 and xglm as on the hub; llama: grouped queries, llama3 scaling; llama-bias: one key head, own head size; gpt2-bf16 in bf16.
FOLDERS = ["gpt2", "gpt2-bf16", "xglm", "llama", "llama-bias", "qwen2", "qwen3"]
STORIES = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "tinystories_260k"
TOLERANCE = 5e-5  # of logits which differ by 0.9 and more between positions and prompts
PAD = -1


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request) -> Path:
    return FIXTURES / request.param


@pytest.fixture(scope="module")
def model(folder) -> Decoder:
    return checkpoint.load(folder)[0]


@pytest.fixture(scope="module")
def reference(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "reference.safetensors")


def forward(model: Decoder, prompts, answers) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.as_tensor(prompts), torch.as_tensor(answers))


def difference(a: torch.Tensor, b: torch.Tensor, answers: torch.Tensor) -> float:
    """The largest, in the logits of the tokens that are there."""
    return (a - b)[answers != PAD].abs().max().item()


def unpad(rows: torch.Tensor) -> list[list[int]]:
    return [row[row != PAD].tolist() for row in rows]


def test_logits_equal_the_reference(model, reference):
    """Typical: 1e-6 to 5e-6, and 1.3e-5 for llama-bias."""
    logits = forward(model, reference["prompts"], reference["answers"])
    assert logits.shape == reference["logits"].shape and logits.dtype == torch.float32
    assert difference(logits, reference["logits"], reference["answers"]) < TOLERANCE
    assert reference["logits"][0].std(0).mean() > 0.5, "positions differ far more than the tolerance"


def test_greedy_completions_equal_the_reference(model, reference):
    expected = unpad(reference["greedy"])
    length = reference["greedy"].shape[1]
    assert generate(model, unpad(reference["prompts"]), length, temperature=0) == expected
    assert any(len(row) < length for row in expected), "some completions end by themselves"


def test_every_parameter_shows_in_the_logits(folder, reference):
    """Otherwise parity would say nothing about the parameter that does not."""
    model, _ = checkpoint.load(folder)
    before = forward(model, reference["prompts"], reference["answers"])
    for name, parameter in model.named_parameters():
        weights = parameter.detach().clone()
        parameter.data = weights.roll(1, 0)
        after = forward(model, reference["prompts"], reference["answers"])
        parameter.data = weights
        assert difference(after, before, reference["answers"]) > 1e-2, name


def test_the_gradient_reaches_every_parameter(folder, reference):
    model, _ = checkpoint.load(folder)
    prompts, answers = reference["prompts"], reference["answers"]
    F.cross_entropy(model(prompts, answers).flatten(0, 1), answers.flatten(), ignore_index=PAD).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 1e-4, name


@torch.no_grad()
def test_cached_steps_equal_the_uncached_forward(model, reference):
    prompts, answers = reference["prompts"], reference["answers"]
    uncached = forward(model, prompts, answers)
    logits, cache = model.prefill(prompts, answers.shape[1])
    for t in range(answers.shape[1]):
        if t:
            logits = model.step(answers[:, t - 1], cache)
        assert difference(logits, uncached[:, t], answers[:, t]) < TOLERANCE, f"step {t}"


@torch.no_grad()
@pytest.mark.parametrize("when", [0, 1, 3])
def test_a_cache_that_dropped_rows_goes_on_as_before(model, reference, when):
    prompts, answers, rows = reference["prompts"], reference["answers"], torch.tensor([3, 0])
    uncached = forward(model, prompts, answers)
    logits, cache = model.prefill(prompts, 6)
    for t in range(6):
        if t == when:
            cache.keep(rows)
            answers, uncached, logits = answers[rows], uncached[rows], logits[rows]
        if t:
            logits = model.step(answers[:, t - 1], cache)
        assert difference(logits, uncached[:, t], answers[:, t]) < TOLERANCE, f"step {t}"


def test_a_row_of_a_batch_equals_the_row_alone(model, reference):
    together = forward(model, reference["prompts"], reference["answers"])
    rows = zip(together, unpad(reference["prompts"]), unpad(reference["answers"]))
    for logits, prompt, answer in rows:
        alone = forward(model, [prompt], [answer])[0]
        assert difference(alone, logits[: len(answer)], torch.tensor(answer)) < TOLERANCE


@pytest.mark.parametrize("more", [1, 7, 100])
def test_padding_changes_no_logits(model, reference, more):
    """Nor does it count: 100 more are beyond the positions of some models."""
    prompts, answers = reference["prompts"], reference["answers"]
    padded = forward(model, F.pad(prompts, (0, more), value=PAD), F.pad(answers, (0, more), value=PAD))
    assert padded.isfinite().all()
    assert difference(padded[:, : answers.shape[1]], forward(model, prompts, answers), answers) < TOLERANCE


def test_logits_know_nothing_of_later_answer_tokens(model, reference):
    prompts, answers = reference["prompts"], reference["answers"]
    before, others = forward(model, prompts, answers), answers.clone()
    others[:, 5:] = 7
    after = forward(model, prompts, others)
    assert difference(after[:, :6], before[:, :6], answers[:, :6]) < TOLERANCE
    assert difference(after, before, answers) > 1e-2


@torch.no_grad()
def test_bf16_stays_near_fp32(model, reference):
    """Norms and rotations are fp32 there and matrix products are not: a mixture that attention must be able to take."""
    prompts, answers = reference["prompts"], reference["answers"]
    before = forward(model, prompts, answers)
    with torch.autocast("cpu", torch.bfloat16):
        after = model(prompts, answers).float()
        first, cache = model.prefill(prompts, 4)
        steps = torch.stack([first, *(model.step(answers[:, t], cache) for t in range(3))], dim=1).float()
    spread = before[answers != PAD].std()
    assert difference(after, before, answers) < 0.4 * spread
    assert difference(steps, before[:, :4], answers[:, :4]) < 0.4 * spread


def test_saved_tensors_are_those_that_were_read(folder, tmp_path):
    """Up to the prefix and the causal masks of GPT-2's own file."""
    checkpoint.save(*checkpoint.load(folder), tmp_path)
    saved, before = (load_file(path / "model.safetensors") for path in (tmp_path, folder))
    before = {name: value for name, value in before.items() if value.dtype != torch.uint8}
    assert {name.removeprefix("transformer.") for name in saved} == {name.removeprefix("transformer.") for name in before}
    for name, value in saved.items():
        other = before[name] if name in before else before[name.removeprefix("transformer.")]
        assert torch.equal(value.float(), other.float()), name


def test_a_prompt_may_use_all_positions_and_not_one_more(model):
    most = model.config.max_positions
    prompts, answers = torch.full((2, most), 5), torch.full((2, 4), 6)
    prompts[0, -4:] = prompts[1, 3:] = PAD
    assert forward(model, prompts, answers).isfinite().all()
    assert generate(model, [[5] * (most - 4)], 4, temperature=0)
    for call in (lambda: forward(model, prompts, F.pad(answers, (0, 1), value=6)), lambda: model.prefill(prompts, 5)):
        with pytest.raises(ValueError, match=rf"\b{most + 1}\b.*\b{most}\b"):
            call()


# Llama 3's rule, worked out in fp64 wavelength by wavelength: with a window of 32 tokens and factors 1 and 4, what turns within
# 8 tokens stays, what takes more than 32 takes 8 times as long, and between them the two are blended.
def expected_frequency(pair: int, config) -> float:
    plain = config.rope_theta ** (-2 * pair / config.d_kv)
    wavelength = 2 * math.pi / plain
    if not config.rope_scaling or wavelength < 8:
        return plain
    if wavelength > 32:
        return plain / 8
    weight = (32 / wavelength - 1) / (4 - 1)
    return weight * plain + (1 - weight) * plain / 8


@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen2", "qwen3"])
def test_rotations_are_products_of_complex_numbers(name):
    config = checkpoint.load(FIXTURES / name)[0].config
    half = config.d_kv // 2
    x = torch.randn(1, 2, 70, config.d_kv, generator=torch.Generator().manual_seed(0))
    angle = torch.arange(70)[:, None] * frequencies(config, x.device)
    rotated = rotate(x, angle.cos(), angle.sin())
    turn = torch.tensor([[expected_frequency(i, config) * t for i in range(half)] for t in range(70)], dtype=torch.float64)
    expected = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.exp(1j * turn)
    assert torch.allclose(rotated.double(), torch.cat([expected.real, expected.imag], -1), atol=2e-5)


def test_the_scaled_fixture_has_all_three_kinds_of_frequency():
    config = checkpoint.load(FIXTURES / "llama")[0].config
    ratio = [expected_frequency(i, config) * config.rope_theta ** (2 * i / config.d_kv) for i in range(4)]
    assert ratio == pytest.approx([1, 0.39, 1 / 8, 1 / 8], rel=0.02)


def test_linear_scaling_stretches_every_wavelength():
    config = checkpoint.load(FIXTURES / "qwen2")[0].config
    plain = frequencies(config, torch.device("cpu"))
    config.rope_scaling = {"rope_type": "linear", "factor": 4.0}
    assert torch.equal(frequencies(config, torch.device("cpu")) * 4, plain)


def test_sinusoidal_positions():
    """Worked out by hand: position p is the table's row p + 2, and the i-th of 8 sines has the frequency 10000^(-i/7)."""
    table = sinusoids(torch.arange(40), 16)
    assert table.shape == (40, 16)
    expected = {(0, 0): 0.909297, (0, 8): -0.416147, (0, 7): 0.0002, (0, 15): 1.0, (1, 0): 0.141120, (1, 8): -0.989992,
                (8, 7): 0.001, (38, 7): 0.004, (38, 15): 0.999992, (10, 1): -0.077564}
    for (position, column), value in expected.items():
        assert table[position, column].item() == pytest.approx(value, abs=1e-6), (position, column)


@pytest.mark.skipif(not STORIES.exists(), reason=f"the trained model is not at {STORIES}")
def test_a_trained_llama_tells_the_story_that_llama2_c_prints():
    model, tokenizer = checkpoint.load(STORIES)
    story = json.loads((STORIES / "greedy_reference.json").read_text())
    prompt = story["token_ids"][:1]
    tokens = generate(model, [prompt], len(story["token_ids"]) - 1, temperature=0)[0]
    assert prompt + tokens == story["token_ids"]
    assert tokenizer.decode(prompt + tokens) == story["text"]
