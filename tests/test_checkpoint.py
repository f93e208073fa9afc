"""Folders that load, in every layout and type of numbers, and saves, interrupted ones too. See also test_configs, test_damage."""

import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_decoder, tiny_t5
from safetensors.torch import load_file, save_file

from minicd.hf import checkpoint
from minicd.runtime import files
from minicd.hf.families import HARMLESS, build, copies, read_config, write_config
from minicd.tokenizer import word_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
FOLDERS = sorted(path.name for path in FIXTURES.iterdir() if (path / "config.json").exists())
INDEX = "model.safetensors.index.json"


def copied(name: str, tmp_path: Path) -> Path:
    """A copy of a fixture, for a test to change."""
    return Path(shutil.copytree(FIXTURES / name, tmp_path / name))


def refused(path: Path, *words: str, **settings) -> str:
    """Loading must raise ValueError, in one readable sentence with these words."""
    with pytest.raises(ValueError) as caught:
        checkpoint.load(path, **settings)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 600, message
    for word in words:
        assert word in message, message
    return message


def change_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def change_weights(folder: Path, **tensors) -> None:
    """Tensors by name; None takes one out. The checksums go too."""
    state = load_file(folder / "model.safetensors") | tensors
    save_file({name: value for name, value in state.items() if value is not None}, folder / "model.safetensors")


def to_pickle(folder: Path) -> Path:
    """Replace model.safetensors by a pytorch_model.bin with the same weights."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def loads_same(folder: Path, reference: Path, **settings) -> bool:
    states = [checkpoint.load(path, **settings)[0].state_dict() for path in (folder, reference)]
    return same(*states)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's files that mean something, under today's names."""
    tensors = {}
    for path in folder.glob("model*.safetensors"):
        tensors |= {name: value for name, value in load_file(path).items() if not HARMLESS.fullmatch(name)}
    old = "wte.weight" in tensors  # GPT-2's own file
    return {f"transformer.{name}" if old else name: value for name, value in tensors.items()}


# saving and loading


@pytest.mark.parametrize("settings", [
    {}, {"feed_forward_proj": "relu", "tie_word_embeddings": True}, {"feed_forward_proj": "gated-silu", "num_decoder_layers": 3},
    {"relative_attention_num_buckets": 10, "relative_attention_max_distance": 30, "dropout_rate": 0.25}])
def test_save_and_load_change_no_bit(tmp_path, settings):
    model = tiny_t5(16, **settings)
    checkpoint.save(model, word_tokenizer(["one", "two"]), tmp_path)
    loaded, tokenizer = checkpoint.load(tmp_path)
    assert loaded.config == model.config
    assert same(loaded.state_dict(), model.state_dict())
    assert not loaded.training and all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())
    assert tokenizer.encode("two one") == [4, 3, 1]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hugging_face_folder_saved_has_the_same_tensors_and_config(name, tmp_path):
    model, tokenizer = checkpoint.load(FIXTURES / name)
    checkpoint.save(model, tokenizer, tmp_path / "once")
    assert same(stored(tmp_path / "once"), {name: value.float() for name, value in stored(FIXTURES / name).items()})
    specials = checkpoint.read_json(tmp_path / "once" / "tokenizer_config.json")  # from which transformers takes them
    assert [tokenizer.backend.token_to_id(specials["eos_token"]), specials.get("pad_token")] == [
        model.config.eos_token_id, "<pad>" if name.startswith("t5") else None]
    again, other = checkpoint.load(tmp_path / "once")
    assert same(again.state_dict(), model.state_dict()) and other.backend.to_str() == tokenizer.backend.to_str()
    assert dataclasses.replace(again.config, **sources(model)) == model.config
    checkpoint.save(again, other, tmp_path / "twice")
    for path in (tmp_path / "once").iterdir():
        assert (tmp_path / "twice" / path.name).read_bytes() == path.read_bytes(), path.name


def sources(model) -> dict:
    """config.json as read is kept in a decoder's config; only the type of the weights may differ in it."""
    return {"source": model.config.source} if hasattr(model.config, "source") else {}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_saved_config_says_what_the_original_said(name):
    """What it adds or changes is only the type of the weights, and for T5 what the original left to the defaults."""
    raw = json.loads((FIXTURES / name / "config.json").read_text())
    written = write_config(read_config(raw), "bfloat16")
    assert written.pop("torch_dtype") == "bfloat16"
    if raw["model_type"] == "t5":
        assert read_config(written) == read_config(raw)
        assert raw.get("scale_decoder_outputs") is False or written | raw == written
    else:
        assert written == {key: value for key, value in raw.items() if key != "torch_dtype"}


def test_transformers_5_marks_v1_1_in_another_way():
    assert not checkpoint.load(FIXTURES / "t5-v1.1")[0].config.tie_word_embeddings
    assert loads_same(FIXTURES / "t5-v1.1-resaved", FIXTURES / "t5-v1.1")


def test_a_copy_in_a_file_of_transformers_5_is_a_tied_head(tmp_path):
    """There the file tells, not tie_word_embeddings; a head of another shape is none, and is named."""
    folder, reference = copied("t5-v1.1-tied", tmp_path), FIXTURES / "t5-v1.1-tied"
    embedding = load_file(folder / "model.safetensors")["shared.weight"]
    for tied in (True, False):
        change_config(folder, tie_word_embeddings=tied)
        change_weights(folder, **{"lm_head.weight": embedding.clone()})
        assert loads_same(folder, reference) and checkpoint.load(folder)[0].config.tie_word_embeddings
        change_weights(folder, **{"lm_head.weight": None})
        assert loads_same(folder, reference)
        other = embedding.clone()
        other[-1, -1] += 0.5
        change_weights(folder, **{"lm_head.weight": other})
        model, _ = checkpoint.load(folder)
        assert not model.config.tie_word_embeddings and torch.equal(model.lm_head.weight, other)
        change_weights(folder, **{"lm_head.weight": embedding[:-1].clone()})
        refused(folder, "lm_head.weight is [63, 16], not [64, 16]")


# types of numbers


@pytest.mark.parametrize("name", FOLDERS)
def test_bf16_on_request(name):
    """T5's wo stays in fp32. The logits are close, measured by how much they vary."""
    reference = load_file(FIXTURES / name / "reference.safetensors")
    there = reference["answers"] > (0 if name.startswith("t5") else -1)
    model, _ = checkpoint.load(FIXTURES / name, dtype=torch.bfloat16)
    kept = {parameter for parameter, value in model.named_parameters() if value.dtype == torch.float32}
    assert kept == {parameter for parameter, _ in model.named_parameters() if name.startswith("t5") and ".wo." in parameter}
    assert all(p.dtype in (torch.float32, torch.bfloat16) for p in model.parameters())
    with torch.no_grad():
        logits = model(reference["prompts"], reference["answers"]).float()[there]
    expected = reference["logits"][there]
    assert logits.isfinite().all()
    assert 0 < (logits - expected).std() < 0.06 * expected.std()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["t5-v1.1", "gpt2", "qwen3"])
def test_half_precision_on_disk_is_read_exactly(name, dtype, tmp_path):
    folder = copied(name, tmp_path)
    half = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items() if value.is_floating_point()}
    save_file(half, folder / "model.safetensors")
    model, tokenizer = checkpoint.load(folder)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    checkpoint.save(model, tokenizer, tmp_path / "saved")
    assert same(stored(tmp_path / "saved"), {name: value.float() for name, value in stored(folder).items()})


def test_weights_kept_in_bf16_survive(tmp_path):
    folder = copied("gpt2", tmp_path)
    change_config(folder, dtype="float32")  # as transformers 5 calls it
    model, tokenizer = checkpoint.load(folder, dtype=torch.bfloat16)
    checkpoint.save(model, tokenizer, folder)
    assert same(checkpoint.load(folder, dtype=torch.bfloat16)[0].state_dict(), model.state_dict())
    config = checkpoint.read_json(folder / "config.json")
    assert config["torch_dtype"] == "bfloat16" and "dtype" not in config


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8, "float32"])
def test_other_types_are_not_computed_with(folder, dtype):
    with pytest.raises(ValueError, match="float32 or bfloat16, not in .*"):
        checkpoint.load(folder, dtype=dtype)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_found_on_request(tmp_path, value):
    folder, name = copied("gpt2", tmp_path), "h.1.mlp.c_fc.weight"
    weight = load_file(folder / "model.safetensors")[name]
    weight[3, 5] = value
    change_weights(folder, **{name: weight})
    refused(folder, "model.safetensors", f"{name} has values that are not finite", check_finite=True)
    loaded = checkpoint.load(folder)[0].state_dict()["blocks.1.feed_forward.wi.weight"][5, 3]
    assert torch.equal(loaded, torch.tensor(value)) or loaded.isnan()
    checkpoint.load(FIXTURES / "gpt2", check_finite=True)


# layouts


@pytest.mark.parametrize("name, extra", [
    ("gpt2", "h.0.attn.masked_bias"), ("gpt2-bf16", "transformer.h.0.attn.bias"), ("xglm", "model.embed_positions.weights"),
    ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq"),
    ("t5-v1.1", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight")])
def test_tensors_that_mean_nothing_are_no_extra_tensors(name, extra, tmp_path):
    folder = copied(name, tmp_path)
    change_weights(folder, **{extra: torch.tensor([1, 0], dtype=torch.uint8)})
    assert loads_same(folder, FIXTURES / name)
    change_weights(folder, **{f"{extra}s": torch.ones(1)})
    refused(folder, f"unexpected {'transformer.' * (name == 'gpt2')}{extra}s")


def test_gpt2_tensors_with_and_without_the_prefix(tmp_path):
    folder = copied("gpt2", tmp_path)
    assert "h.0.attn.bias" in load_file(folder / "model.safetensors")
    save_file(stored(folder), folder / "model.safetensors")
    assert loads_same(folder, FIXTURES / "gpt2")
    change_weights(folder, **{"wte.weight": torch.zeros(64, 16)})  # which of the two would it be?
    refused(folder, "unexpected wte.weight")


TIED = ["gpt2", "llama-bias", "qwen2", "t5-v1.0", "xglm"]


@pytest.mark.parametrize("name", TIED)
def test_a_copy_of_the_embedding_is_no_extra_tensor(name, tmp_path):
    folder = copied(name, tmp_path)
    embedding, names = copies(read_config(json.loads((folder / "config.json").read_text())))
    assert "lm_head.weight" in names
    value = load_file(folder / "model.safetensors")[embedding.removeprefix("transformer.")]
    for dtype in (torch.float32, torch.bfloat16):
        change_weights(folder, **{copy: value.clone() for copy in names})
        assert loads_same(folder, FIXTURES / name, dtype=dtype)
    other = value.clone()
    other[-1, -1] += 0.5
    for copy in names:
        for wrong in (other, value[:-1].clone()):
            change_weights(folder, **dict.fromkeys(names) | {copy: wrong})
            refused(folder, f"{copy} is no copy of {embedding}")


def test_a_pytorch_model_bin_is_converted(folder):
    expected = checkpoint.load(folder)[0].state_dict()
    to_pickle(folder)
    assert same(checkpoint.load(folder)[0].state_dict(), expected)
    assert (folder / "model.safetensors").exists()


def test_a_pytorch_model_bin_in_shards_is_named(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    refused(folder, "has pytorch_model.bin in shards, which is not read")


def test_a_decoder_without_a_config_file_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="this decoder has no config.json to write"):
        checkpoint.save(tiny_decoder(), word_tokenizer([]), tmp_path)


def test_a_pytorch_model_bin_where_nothing_can_be_written(folder, monkeypatch):
    def no_place(*arguments, **settings):
        raise PermissionError(13, "Permission denied")
    to_pickle(folder)
    monkeypatch.setattr(files, "open", no_place, raising=False)
    refused(folder, "pytorch_model.bin", "model.safetensors, which cannot be written (Permission denied)", "copy the folder")


def test_shards_are_one_model(tmp_path):
    whole = copied("t5-sharded", tmp_path)
    save_file(stored(whole), whole / "model.safetensors")  # which comes before the index
    for path in whole.glob("model-*"):
        path.unlink()
    assert loads_same(whole, FIXTURES / "t5-sharded")


def test_a_missing_shard_is_named(tmp_path):
    folder = copied("t5-sharded", tmp_path)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "model-00002-of-00003.safetensors is missing")


ELSEWHERE = [3, None, "config.json", "..", "", "a\0b.safetensors", "../model.safetensors", f"{FIXTURES}/gpt2/model.safetensors"]
NO_MAPS = [[], {}, "model.safetensors", *({"shared.weight": file} for file in ELSEWHERE)]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", *(json.dumps({"weight_map": value}) for value in NO_MAPS)])
def test_an_index_that_names_no_files_of_the_folder(content, tmp_path):
    folder = copied("t5-sharded", tmp_path)
    (folder / INDEX).write_text(content)
    refused(folder, INDEX, "is not valid JSON" if content in ("", "{") else "has no weight_map from tensors to files of this")


def test_a_tensor_in_two_shards(tmp_path):
    folder = copied("t5-sharded", tmp_path)
    one, two = folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors"
    name = min(load_file(one))
    save_file(load_file(two) | {name: load_file(one)[name]}, two)
    refused(folder, f"{two} and {one.name} both hold {name}")


def test_a_tensor_that_the_index_lists_and_no_shard_has(tmp_path):
    folder = copied("t5-sharded", tmp_path)
    path = folder / "model-00003-of-00003.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    del tensors[name]
    save_file(tensors, path)
    refused(folder, INDEX, f"missing {name}")


# memory and time


PROBE = """
import re, sys
import torch
from minicd.hf import checkpoint
torch.set_num_threads(1)
def memory(key):
    return 1024 * int(re.search(rf"{key}:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = memory("VmRSS")
model, _ = checkpoint.load(sys.argv[1])
growth = memory("VmHWM") - before
print(growth / sum(4 * p.numel() for p in model.parameters()), "torch._dynamo" in sys.modules)
"""


def test_loading_needs_little_more_memory_than_the_model(tmp_path):
    """Its peak, in a fresh process. Nor is PyTorch's compiler imported there, which alone would take seconds."""
    if "VmHWM" not in (Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else ""):
        pytest.skip("this system does not tell a process its peak memory")
    config = {"model_type": "gpt2", "vocab_size": 32000, "n_embd": 512, "n_layer": 2, "n_head": 8, "eos_token_id": 1,
              "tie_word_embeddings": False}
    with torch.device("meta"):
        model = build(read_config(config))  # 158 MB: large matrices at both ends, and some that the file keeps transposed
    checkpoint.save(model.to_empty(device="cpu"), word_tokenizer([]), tmp_path)
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", PROBE, str(tmp_path)], cwd=root, capture_output=True, text=True, check=True)
    factor, compiler = done.stdout.split()
    assert 0.9 < float(factor) < 1.3, done.stdout
    assert compiler == "False"


# interrupted saves


class FullDisk:
    """A file that takes half of what it is given."""

    def __init__(self, file, error):
        self.file, self.error = file, error

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def writelines(self, pieces):
        data = b"".join(pieces)
        self.file.write(data[: len(data) // 2])
        raise self.error


def full_disk(monkeypatch, error) -> None:
    monkeypatch.setattr(files, "open", lambda *how: FullDisk(open(*how), error), raising=False)


def failing(name: str):
    def install(monkeypatch, error) -> None:
        def fail(*arguments):
            raise error
        monkeypatch.setattr(files.os, name, fail)
    return install


@pytest.mark.parametrize("interrupt", [full_disk, failing("fsync"), failing("replace")], ids=["write", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_an_interrupted_save_leaves_the_old_files_and_nothing_else(folder, monkeypatch, interrupt, error):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for save in (lambda: checkpoint.save(tiny_t5(16, seed=9), word_tokenizer(["other"]), folder),
                 lambda: files.atomic_safetensors(folder / "model.safetensors", {"x": torch.ones(3)})):
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            interrupt(patch, error)
            save()
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    child = os.fork()
    if child == 0:  # dies when all is written and nothing renamed
        try:
            files.os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)
            files.atomic_bytes(path, b"new" * 1000)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert path.read_bytes() == b"old"
    files.atomic_bytes(path, b"new")
    assert path.read_bytes() == b"new"
