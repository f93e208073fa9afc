"""Folders that load, folders that must not, and saves that are interrupted."""

import errno
import json
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from helpers import tiny_t5
from safetensors.torch import load_file, save_file

from minicd import checkpoint, files
from minicd.tokenizer import word_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
Q = "encoder.block.0.layer.0.SelfAttention.q.weight"
K = "encoder.block.0.layer.0.SelfAttention.k.weight"
V = "encoder.block.0.layer.0.SelfAttention.v.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sound folder, for a test to damage."""
    path = tmp_path / "model"
    checkpoint.save(tiny_t5(16), word_tokenizer(["one", "two"]), path)
    return path


def refused(path: Path, *words: str) -> str:
    """Loading must raise ValueError, in one readable sentence with these words."""
    with pytest.raises(ValueError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message and len(message) < 600, message
    for word in words:
        assert word in message, message
    return message


def change_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def change_weights(folder: Path, **tensors) -> None:
    """Tensors by name; None takes one out."""
    state = load_file(folder / "model.safetensors") | tensors
    save_file({name: value for name, value in state.items() if value is not None}, folder / "model.safetensors")


def to_pickle(folder: Path) -> Path:
    """Replace model.safetensors by a pytorch_model.bin with the same weights."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# what loads


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


def test_two_saves_of_one_model_give_the_same_files(folder, tmp_path):
    checkpoint.save(*checkpoint.load(folder), tmp_path / "again")
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1", "t5-buckets"])
def test_saving_a_hugging_face_folder_gives_the_same_tensors(name, tmp_path):
    checkpoint.save(*checkpoint.load(FIXTURES / name), tmp_path)
    assert same(load_file(tmp_path / "model.safetensors"), load_file(FIXTURES / name / "model.safetensors"))


def test_transformers_5_marks_v1_1_in_another_way():
    one, _ = checkpoint.load(FIXTURES / "t5-v1.1")
    other, _ = checkpoint.load(FIXTURES / "t5-v1.1-resaved")
    assert not other.config.tie_word_embeddings
    assert same(one.state_dict(), other.state_dict())


def test_dtype_on_request(folder):
    model, _ = checkpoint.load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_weights_kept_in_bf16_survive(tmp_path):
    model = tiny_t5(16).to(torch.bfloat16)
    checkpoint.save(model, word_tokenizer([]), tmp_path)
    assert same(checkpoint.load(tmp_path, dtype=torch.bfloat16)[0].state_dict(), model.state_dict())


def test_copies_of_the_embedding_are_no_extra_tensors(tmp_path):
    model = tiny_t5(16, tie_word_embeddings=True)
    checkpoint.save(model, word_tokenizer([]), tmp_path)
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
    change_weights(tmp_path, **{name: model.shared.weight.detach().clone() for name in names})
    assert same(checkpoint.load(tmp_path)[0].state_dict(), model.state_dict())


def test_a_pytorch_model_bin_is_converted(folder):
    expected = checkpoint.load(folder)[0].state_dict()
    to_pickle(folder)
    assert same(checkpoint.load(folder)[0].state_dict(), expected)
    assert (folder / "model.safetensors").exists()


# what does not


def test_a_folder_that_is_not_there(tmp_path):
    refused(tmp_path / "nowhere", "nowhere is not a folder")


def test_a_file_is_no_folder(folder):
    refused(folder / "config.json", "config.json is not a folder")


def test_a_hub_id_that_cannot_be_had(tmp_path, monkeypatch):
    def offline(*arguments, **settings):
        raise ConnectionError("no network")
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    refused("nobody/nothing", "nobody/nothing is no folder", "could not be downloaded")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    refused(folder, f"{name} is missing")


@pytest.mark.parametrize("content", [b"", b"{", b"{'model_type': 't5'}", b"\xff\xfe\x00", b"not json"])
def test_a_config_that_is_not_json(folder, content):
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json is not valid JSON")


@pytest.mark.parametrize("content", ["[]", "null", '"t5"', "{}", '{"model_type": "bert"}', '{"model_type": null}'])
def test_a_config_of_something_else(folder, content):
    (folder / "config.json").write_text(content)
    refused(folder, "config.json describes a model of type", "t5")


@pytest.mark.parametrize("field, value", [("d_model", "16"), ("d_model", None), ("num_heads", -2), ("vocab_size", 16.5),
                                          ("feed_forward_proj", "gated-tanh"), ("feed_forward_proj", 3), ("eos_token_id", [1])])
def test_a_config_with_a_wrong_value(folder, field, value):
    change_config(folder, **{field: value})
    refused(folder, "config.json", field)


def test_a_config_without_a_size(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["d_kv"]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "config.json", "d_kv")


def test_missing_and_unexpected_tensors_are_named(folder):
    change_weights(folder, **{Q: None, "encoder.block.7.layer.0.layer_norm.weight": torch.ones(16)})
    refused(folder, "model.safetensors", f"missing {Q}", "unexpected encoder.block.7")


def test_a_config_of_another_depth(folder):
    change_config(folder, num_layers=9)
    refused(folder, "model.safetensors", "does not fit its config.json", "missing", "more")


@pytest.mark.parametrize("shapes, named", [
    ({Q: (16, 8)}, f"{Q} is [16, 8], not [16, 16]"),
    ({"shared.weight": (15, 16)}, "shared.weight is [15, 16], not [16, 16]"),
    ({K: (16, 15)}, f"{K} is [16, 15]"),
    ({K: (15, 16), V: (17, 16)}, f"{K} is [15, 16]"),  # stacked, these would have the right shape
    ({Q: ()}, f"{Q} is []")])
def test_a_tensor_of_a_wrong_shape(folder, shapes, named):
    change_weights(folder, **{name: torch.zeros(shape) for name, shape in shapes.items()})
    refused(folder, "model.safetensors", named)


def test_a_config_of_another_width(folder):
    change_config(folder, d_model=32)
    refused(folder, "model.safetensors", "does not fit its config.json")


@pytest.mark.parametrize("name", ["lm_head.weight", "decoder.embed_tokens.weight"])
def test_what_calls_itself_a_copy_of_the_embedding_must_be_one(tmp_path, name):
    checkpoint.save(tiny_t5(16, tie_word_embeddings=True), word_tokenizer([]), tmp_path)
    change_weights(tmp_path, **{name: torch.ones(16, 16)})
    refused(tmp_path, "model.safetensors", f"{name} is no copy of shared.weight")


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_truncated_weights(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, "model.safetensors is damaged")


def test_a_flipped_bit_in_the_header_is_noticed_or_harmless(folder):
    """Every bit of the header's length, and a sample of the header's own."""
    path = folder / "model.safetensors"
    sound, expected = path.read_bytes(), checkpoint.load(folder)[0].state_dict()
    header = 8 + int.from_bytes(sound[:8], "little")
    model, noticed = tiny_t5(16, seed=9), 0
    positions = [*range(64), *range(64, 8 * header, 8 * header // 150 | 1)]
    for position in positions:
        damaged = bytearray(sound)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            checkpoint.load_weights(model, path)
        except ValueError as error:
            noticed += 1
            assert "model.safetensors" in str(error)
        else:
            assert same(model.state_dict(), expected), position
    assert noticed > 0.9 * len(positions)


def test_a_tokenizer_larger_than_the_embedding(folder):
    word_tokenizer([f"w{i}" for i in range(14)]).save(folder / "tokenizer.json")
    refused(folder, "tokenizer.json has 17 tokens", "embedding only 16")


def test_a_damaged_tokenizer(folder):
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-20])
    refused(folder, "tokenizer.json is not a readable tokenizer")


class Bomb:
    """What a malicious pickle does: call any function on reading."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_malicious_pickle_is_not_run(folder, tmp_path, write):
    path = to_pickle(folder)
    write({"shared.weight": Bomb(tmp_path / "trace")}, path)
    refused(folder, "pytorch_model.bin", "code")
    assert not (tmp_path / "trace").exists() and not (folder / "model.safetensors").exists()


@pytest.mark.parametrize("value", [torch.ones(3), [torch.ones(3)], {"shared.weight": 3}, {3: torch.ones(3)}])
def test_a_pytorch_model_bin_without_named_tensors(folder, value):
    torch.save(value, to_pickle(folder))
    refused(folder, "pytorch_model.bin does not hold")


@pytest.mark.parametrize("kept", [0, 10, -10])
def test_a_truncated_pytorch_model_bin(folder, kept):
    path = to_pickle(folder)
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, "pytorch_model.bin is damaged")


# interrupted saves


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class FullDisk:
    """A file that takes half of what it is given."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data: bytes):
        self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def full_disk(monkeypatch, error) -> None:
    monkeypatch.setattr(files, "open", lambda *how: FullDisk(open(*how)), raising=False)


def failing(name: str):
    def install(monkeypatch, error) -> None:
        def fail(*arguments):
            raise error
        monkeypatch.setattr(files.os, name, fail)
    return install


@pytest.mark.parametrize("interrupt", [full_disk, failing("fsync"), failing("replace")], ids=["write", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_an_interrupted_save_leaves_the_old_files_and_nothing_else(folder, monkeypatch, interrupt, error):
    before = contents(folder)
    with monkeypatch.context() as patch, pytest.raises((OSError, KeyboardInterrupt)):
        interrupt(patch, error)
        checkpoint.save(tiny_t5(16, seed=9), word_tokenizer(["other"]), folder)
    assert contents(folder) == before
    with monkeypatch.context() as patch, pytest.raises((OSError, KeyboardInterrupt)):
        interrupt(patch, error)
        files.atomic_safetensors(folder / "model.safetensors", {"x": torch.ones(3)})
    assert contents(folder) == before


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
