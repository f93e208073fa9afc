"""T5 against what Hugging Face transformers computed (fixtures/make_t5.py), and against itself: caches, batches, padding."""

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import tiny_t5
from safetensors.torch import load_file

from minicd.hf import checkpoint
from minicd.hf.families import read_config
from minicd.sampling import generate
from minicd.t5 import T5, RelativeBias, T5Config, initialise

FIXTURES = Path(__file__).parent / "fixtures"
# The last two have a config.json as transformers 5 writes it: both say that embedding and head are tied, which is true of the
# last only. The one before is the second, resaved.
FOLDERS = ["t5-v1.0", "t5-v1.1", "t5-buckets", "t5-sharded", "t5-v1.1-resaved", "t5-v1.1-tied"]
TOLERANCE = 1e-4  # of logits which differ by 0.4 and more between positions and prompts


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request) -> Path:
    return FIXTURES / request.param


@pytest.fixture(scope="module")
def model(folder) -> T5:
    return checkpoint.load(folder)[0]


@pytest.fixture(scope="module")
def reference(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "reference.safetensors")


def forward(model: T5, prompts, answers) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.as_tensor(prompts), torch.as_tensor(answers))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest, in logits."""
    return (a - b).abs().max().item()


def unpad(rows: torch.Tensor, pad_id: int) -> list[list[int]]:
    return [row[row != pad_id].tolist() for row in rows]


def test_logits_equal_the_reference(model, reference):
    """Typical: 0 for v1.0, 4e-6 for the gated ones, which multiply gate and up in one matrix product."""
    logits = forward(model, reference["prompts"], reference["answers"])
    assert logits.shape == reference["logits"].shape
    assert difference(logits, reference["logits"]) < TOLERANCE
    assert reference["logits"].std(1).mean() > 0.3, "positions differ far more than the tolerance"


def test_greedy_completions_equal_the_reference(model, reference):
    expected = unpad(reference["greedy"], -1)
    length = reference["greedy"].shape[1]
    assert generate(model, unpad(reference["prompts"], 0), length, temperature=0) == expected
    assert any(len(row) < length for row in expected), "some completions end by themselves"


HEADS = [(tied, scaled) for tied in (True, False) for scaled in (True, False)]


def saved_with_head(folder: Path, tied: bool, scaled: bool) -> T5:
    """A model of t5-v1.1's weights with such a head, after saving and loading."""
    donor, tokenizer = checkpoint.load(FIXTURES / "t5-v1.1")
    model = T5(dataclasses.replace(donor.config, tie_word_embeddings=tied, scale_decoder_outputs=scaled))
    model.load_state_dict(donor.state_dict(), strict=not tied)
    checkpoint.save(model, tokenizer, folder)
    return checkpoint.load(folder)[0]


@pytest.mark.parametrize("tied, scaled", HEADS)
def test_a_head_is_tied_or_not_and_scaled_or_not(tied, scaled, tmp_path):
    """The scale is a factor of the logits, and a tied head the embedding: so the four follow from t5-v1.1's logits."""
    reference = load_file(FIXTURES / "t5-v1.1" / "reference.safetensors")
    donor = checkpoint.load(FIXTURES / "t5-v1.1")[0]
    assert torch.allclose(forward(donor, reference["prompts"], reference["answers"]), reference["logits"], atol=TOLERANCE)
    if tied:
        donor.lm_head.weight = torch.nn.Parameter(donor.shared.weight.detach().clone())
    expected = forward(donor, reference["prompts"], reference["answers"]) * (donor.config.d_model**-0.5 if scaled else 1)
    model = saved_with_head(tmp_path, tied, scaled)
    assert hasattr(model, "lm_head") != tied
    assert difference(forward(model, reference["prompts"], reference["answers"]), expected) < TOLERANCE
    assert generate(model, [[5, 6, 1]], 6, temperature=0) == generate(donor, [[5, 6, 1]], 6, temperature=0)


@pytest.mark.parametrize("tied, scaled", HEADS)
def test_transformers_reads_and_writes_the_same_head(tied, scaled, tmp_path):
    """A folder of ours, what transformers computes from it, and what we compute from what transformers saves."""
    transformers = pytest.importorskip("transformers", "5.0", reason="needs transformers 5")
    reference = load_file(FIXTURES / "t5-v1.1" / "reference.safetensors")
    ours = forward(saved_with_head(tmp_path / "ours", tied, scaled), reference["prompts"], reference["answers"])
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = theirs(input_ids=reference["prompts"], attention_mask=(reference["prompts"] != 0).long(),
                        labels=reference["answers"]).logits
    assert difference(ours, logits) < TOLERANCE
    theirs.save_pretrained(tmp_path / "theirs")
    assert ("lm_head.weight" in load_file(tmp_path / "theirs" / "model.safetensors")) != tied
    (tmp_path / "theirs" / "tokenizer.json").write_bytes((tmp_path / "ours" / "tokenizer.json").read_bytes())
    again, _ = checkpoint.load(tmp_path / "theirs")
    assert again.config == checkpoint.load(tmp_path / "ours")[0].config
    assert difference(forward(again, reference["prompts"], reference["answers"]), ours) < TOLERANCE


def test_every_parameter_shows_in_the_logits(folder, reference):
    """Otherwise parity would say nothing about the parameter that does not."""
    model, _ = checkpoint.load(folder)
    before = forward(model, reference["prompts"], reference["answers"])
    for name, parameter in model.named_parameters():
        weights = parameter.detach().clone()
        parameter.data = weights.roll(1, 0)
        change = (forward(model, reference["prompts"], reference["answers"]) - before).abs().max()
        parameter.data = weights
        assert change > 1e-2, name


@torch.no_grad()
def test_cached_steps_equal_the_uncached_forward(model, reference):
    prompts, answers = reference["prompts"], reference["answers"]
    uncached = forward(model, prompts, answers)
    logits, cache = model.prefill(prompts, answers.shape[1])
    for t in range(answers.shape[1]):
        if t:
            logits = model.step(answers[:, t - 1], cache)
        assert difference(logits, uncached[:, t]) < TOLERANCE, f"step {t}"


@torch.no_grad()
def test_a_cache_that_dropped_rows_goes_on_as_before(model, reference):
    prompts, answers, rows = reference["prompts"], reference["answers"], torch.tensor([3, 0])
    uncached = forward(model, prompts, answers)
    logits, cache = model.prefill(prompts, 6)
    for t in range(6):
        if t == 3:
            cache.keep(rows)
            answers, uncached = answers[rows], uncached[rows]
        if t:
            logits = model.step(answers[:, t - 1], cache)
        assert difference(logits, uncached[:, t]) < TOLERANCE, f"step {t}"


def test_a_row_of_a_batch_equals_the_row_alone(model, reference):
    together = forward(model, reference["prompts"], reference["answers"])
    rows = zip(together, unpad(reference["prompts"], 0), unpad(reference["answers"], 0))
    for logits, prompt, answer in rows:
        assert difference(forward(model, [prompt], [answer])[0], logits[: len(answer)]) < TOLERANCE


@pytest.mark.parametrize("more", [1, 7, 100])
def test_padding_changes_no_logits(model, reference, more):
    prompts, answers = reference["prompts"], reference["answers"]
    padded = forward(model, torch.nn.functional.pad(prompts, (0, more)), torch.nn.functional.pad(answers, (0, more)))
    assert difference(padded[:, : answers.shape[1]], forward(model, prompts, answers)) < TOLERANCE


def test_logits_know_nothing_of_later_answer_tokens(model, reference):
    prompts, answers = reference["prompts"], reference["answers"].clone()
    before = forward(model, prompts, answers)
    answers[:, 5:] = 7
    assert difference(forward(model, prompts, answers)[:, :6], before[:, :6]) < TOLERANCE


# Worked out by hand. In both directions 16 buckets are left for each: 0 to 7 hold one distance each, then
# 8 + floor(8 log(d / 8) / log(128 / 8)) = 8 + floor(2 log2(d / 8)); keys to the right have 16 more. In one direction
# it is 16 + floor(16 log(d / 16) / log(128 / 16)). With 10 buckets and distance 20: 2 + floor(3 log10(d / 2)),
# and 5 + floor(5 log4(d / 5)).
BOTH = {0: 0, -1: 1, -7: 7, -8: 8, -11: 8, -12: 9, -16: 10, -22: 10, -23: 11, -32: 12, -64: 14, -90: 14, -91: 15, -127: 15,
        -128: 15, -5000: 15, 1: 17, 7: 23, 8: 24, 12: 25, 90: 30, 91: 31, 5000: 31}
ONE = {0: 0, 1: 0, 50: 0, -1: 1, -15: 15, -16: 16, -18: 16, -19: 17, -32: 21, -64: 26, -112: 30, -113: 31, -128: 31, -5000: 31}
SMALL_BOTH = {0: 0, -1: 1, -2: 2, -4: 2, -5: 3, -9: 3, -10: 4, -20: 4, -99: 4, 1: 6, 4: 7, 5: 8, 10: 9, 99: 9}
SMALL_ONE = {3: 0, 0: 0, -4: 4, -5: 5, -6: 5, -7: 6, -10: 7, -19: 9, -20: 9, -99: 9}


@pytest.mark.parametrize("buckets, most, bidirectional, expected", [
    (32, 128, True, BOTH), (32, 128, False, ONE), (10, 20, True, SMALL_BOTH), (10, 20, False, SMALL_ONE)])
def test_buckets_of_relative_distance(buckets, most, bidirectional, expected):
    config = T5Config(8, 4, 2, 4, 2, 1, relative_attention_num_buckets=buckets, relative_attention_max_distance=most)
    found = RelativeBias(config, bidirectional).bucket(torch.tensor(list(expected)))
    assert dict(zip(expected, found.tolist())) == expected


def test_the_bias_is_the_embedding_of_key_minus_query():
    bias = RelativeBias(T5Config(8, 4, 2, 4, 2, 1), bidirectional=True)
    values = bias(torch.arange(3), torch.arange(4))
    assert values.shape == (1, 2, 3, 4)
    assert torch.equal(values[0, :, 0, 3], bias.embedding.weight[16 + 3])
    assert torch.equal(values[0, :, 2, 0], bias.embedding.weight[2])


def test_initialise_is_reproducible():
    one = tiny_t5(seed=3).state_dict()
    torch.rand(5)  # the global generator plays no part
    for name, value in tiny_t5(seed=3).state_dict().items():
        assert torch.equal(value, one[name]), name
    assert not torch.equal(tiny_t5(seed=4).state_dict()["shared.weight"], one["shared.weight"])


def test_initialise_draws_at_the_scales_of_t5():
    config = T5Config(vocab_size=500, d_model=64, d_kv=16, d_ff=256, num_heads=8, num_layers=1, tie_word_embeddings=False)
    weights = initialise(T5(config), seed=0).state_dict()
    expected = {"shared": 1.0, "lm_head": 1 / 8, "decoder.relative_bias.embedding": 1 / 8, "decoder.blocks.0.cross.q": 1 / 32,
                "decoder.blocks.0.cross.kv": 1 / 8, "encoder.blocks.0.attention.o": 128**-0.5,
                "encoder.blocks.0.feed_forward.wi": 1 / 8, "encoder.blocks.0.feed_forward.wo": 1 / 16}
    for name, scale in expected.items():
        assert weights[f"{name}.weight"].std().item() == pytest.approx(scale, rel=0.15), name
    assert torch.equal(weights["encoder.norm.weight"], torch.ones(64))


@pytest.mark.parametrize("wrong", [{"d_model": "16"}, {"d_ff": -1}, {"num_heads": None}, {"feed_forward_proj": None},
                                   {"feed_forward_proj": "gated-tanh"}, {"tie_word_embeddings": "no"}, {"eos_token_id": [1, 2]}])
def test_a_wrong_setting_is_named(wrong):
    right = dict(model_type="t5", vocab_size=8, d_model=4, d_kv=2, d_ff=4, num_heads=2, num_layers=1)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        read_config({**right, **wrong})
