"""What ends a completion: config.json, generation_config.json, the tokenizer, or nothing but its length."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from test_checkpoint import FIXTURES, change_config, copied, refused

from minicd.distill import Context, PracticeSettings, distill, identity, practice
from minicd.hf import checkpoint
from minicd.labels import Examples
from minicd.sampling import generate, score
from minicd.training import FitSettings

DECODERS = ["gpt2", "xglm", "llama", "qwen2", "qwen3"]
NOWHERE = "neither config.json nor generation_config.json nor tokenizer_config.json names a token that ends a completion"


def write(folder: Path, **files) -> None:
    """NAME.json with this content, by its name."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))


def ends(folder: Path) -> list[int]:
    """The tokens that end a completion of this folder's model, which must be the tokenizer's too; no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, tokenizer = checkpoint.load(folder)
    assert tokenizer.eos_id == model.config.eos_token_id
    return [model.config.eos_token_id, *model.config.more_eos_token_ids]


@pytest.mark.parametrize("name", DECODERS)
def test_the_end_is_looked_for_in_three_files(name, tmp_path):
    folder = copied(name, tmp_path)
    change_config(folder, eos_token_id=None)
    _, tokenizer = checkpoint.load(FIXTURES / name)
    piece = tokenizer.backend.id_to_token(7)
    for token in (piece, {"content": piece, "special": True}):  # which of the two depends on the version of transformers
        write(folder, tokenizer_config={"eos_token": token}, generation_config={"eos_token_id": None, "top_p": 0.5})
        assert ends(folder) == [7]
    write(folder, generation_config={"eos_token_id": 9})
    assert ends(folder) == [9]
    write(folder, generation_config={"eos_token_id": [9, 60]})
    assert ends(folder) == [9, 60]
    change_config(folder, eos_token_id=[5, 60])
    assert ends(folder) == [5, 60, 9], "further ones of generation_config.json count too"


def test_ends_found_elsewhere_are_saved(tmp_path):
    folder = copied("qwen2", tmp_path)
    change_config(folder, eos_token_id=None)
    write(folder, generation_config={"eos_token_id": [9, 60]})
    checkpoint.save(*checkpoint.load(folder), tmp_path / "saved")
    assert checkpoint.read_json(tmp_path / "saved" / "config.json")["eos_token_id"] == [9, 60]
    assert ends(tmp_path / "saved") == [9, 60]


@pytest.mark.parametrize("files, words", [
    ({"generation_config": "{"}, "generation_config.json is not valid JSON"),
    ({"generation_config": "[1]"}, "generation_config.json holds a list instead of an object"),
    ({"generation_config": {"eos_token_id": "2"}}, "generation_config.json: eos_token_id cannot be '2'"),
    ({"generation_config": {"eos_token_id": [1, 999]}}, "generation_config.json: eos_token_id cannot be 999, the vocabulary has"),
    ({"generation_config": {"eos_token_id": 66}}, "no token with the id 66, which is eos_token_id in generation_config.json"),
    ({"tokenizer_config": "{"}, "tokenizer_config.json is not a readable tokenizer"),
    ({"tokenizer_config": "[]"}, "tokenizer_config.json is not a readable tokenizer: it holds a list"),
    ({"tokenizer_config": {"eos_token": "<nowhere>"}}, "tokenizer_config.json: its eos_token '<nowhere>' is no token"),
    ({"tokenizer_config": {"eos_token": {"special": True}}}, "its eos_token {'special': True} is no token"),
    ({"tokenizer_config": {"eos_token": 7}}, "its eos_token 7 is no token")])
def test_a_damaged_file_is_named(files, words, tmp_path):
    folder = copied("qwen2", tmp_path)
    change_config(folder, eos_token_id=None)
    write(folder, **files)
    refused(folder, words)


@pytest.fixture
def endless(tmp_path):
    """A model and its tokenizer without a token that ends a completion."""
    folder = copied("qwen2", tmp_path)
    change_config(folder, eos_token_id=None)
    with pytest.warns(UserWarning, match=NOWHERE) as said:
        model, tokenizer = checkpoint.load(folder)
    assert len(said) == 1 and str(said[0].message).startswith(f"{folder}: ")
    assert (model.config.eos_token_id, tokenizer.eos_id) == (-1, None)
    return model, tokenizer


def test_without_an_end_every_completion_has_its_full_length(endless):
    model, tokenizer = endless
    prompts = [[5, 6], [7], [8, 9, 10], [11]]
    found, reasons = generate(model, prompts, 30, generator=torch.Generator().manual_seed(0), reasons=True)
    assert [len(tokens) for tokens in found] == [30] * 4 and reasons == ["length"] * 4
    assert [len(row) for row in score(model, prompts, found)] == [30] * 4
    assert tokenizer.encode_answer("ab") == tokenizer.encode("ab"), "no stop token is appended"
    one_of_each = [tokens[5] for tokens in found]
    again, reasons = generate(model, prompts, 30, generator=torch.Generator().manual_seed(0), stop=one_of_each, reasons=True)
    assert reasons == ["stop"] * 4 and not {token for tokens in again for token in tokens} & set(one_of_each)


def test_without_an_end_stop_strings_end_a_completion(endless):
    model, tokenizer = endless
    prompts = [[n] for n in range(5, 25)]
    whole = generate(model, prompts, 30, temperature=0)
    strings = sorted({char for text in map(tokenizer.decode, whole) for char in text[2:] if char.strip()})[:2]
    cut, reasons = generate(model, prompts, 30, temperature=0, stop=strings, tokenizer=tokenizer, reasons=True)
    assert "stop" in reasons and "eos" not in reasons
    for tokens, shorter, why in zip(whole, cut, reasons):
        assert tokens[: len(shorter)] == shorter and (why == "stop") == (len(shorter) < 30)
        assert not any(s in tokenizer.decode(shorter) for s in strings)


def test_a_model_without_an_end_is_saved_without_one(endless, tmp_path):
    checkpoint.save(*endless, tmp_path / "saved")
    assert not checkpoint.read_json(tmp_path / "saved" / "config.json")["eos_token_id"]
    assert "eos_token" not in checkpoint.read_json(tmp_path / "saved" / "tokenizer_config.json")
    with pytest.warns(UserWarning, match=NOWHERE):
        assert checkpoint.load(tmp_path / "saved")[0].config == endless[0].config


def test_a_model_without_an_end_can_be_trained(endless):
    model, tokenizer = endless
    texts = ["ab", "abc", "b", "cab"]
    items = Examples.hard(tokenizer.encode_all(texts), tokenizer.encode_answers(texts))
    losses = distill(model, items, FitSettings(lr=1e-2, batch_size=2, loss="hard"), epochs=30)
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Llama"])
def test_a_folder_as_transformers_writes_it(family, tmp_path):
    transformers = pytest.importorskip("transformers", "5.0", reason="needs transformers 5")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=68, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((FIXTURES / "qwen2" / "tokenizer.json").read_bytes())
    if config.eos_token_id is None:
        with pytest.warns(UserWarning, match=NOWHERE):
            ours, _ = checkpoint.load(tmp_path)
    else:
        ours, _ = checkpoint.load(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(ours(ids[:, :1], torch.tensor([[6, 7, 8, 9]])), theirs(ids).logits, atol=1e-5)


@pytest.mark.parametrize("extract, length", [(identity, 6), (lambda y: slice(1, 4), 3)])
def test_a_model_without_an_end_can_practise(endless, extract, length):
    """No stop token is appended, neither where f keeps the whole nor where it cuts something off."""
    model, tokenizer = endless
    context = Context(lambda n, rng: ["ab"] * n, "say {}".format, str, extract)
    items = practice(model, tokenizer, context, 20, PracticeSettings(max_new_tokens=6))
    assert set(items.answers.lengths.tolist()) == {length} and len(items) == 20
    distill(model, items, FitSettings(lr=1e-3, batch_size=4, loss="empirical"))
