"""Folders that must not load: many damaged by chance, others in a certain way, and what the command line says."""

import importlib
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import FIXTURES, change_config, change_weights, refused, same, to_pickle

from bench.accidents import ACCIDENTS, accident
from minicd.hf import checkpoint
from minicd.tasks.settings import guarded

ROOT = Path(__file__).resolve().parent.parent
Q = "encoder.block.0.layer.0.SelfAttention.q.weight"
K = "encoder.block.0.layer.0.SelfAttention.k.weight"
V = "encoder.block.0.layer.0.SelfAttention.v.weight"
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
Contents = dict[str, bytes | None]  # of a folder's files; None is a directory in place of one


# damaged by chance


@pytest.fixture(scope="module", params=["t5-v1.1", "gpt2", "qwen3"])
def sound(request, tmp_path_factory) -> Contents:
    """What minicd wrote, checksums and all."""
    path = tmp_path_factory.mktemp("sound")
    checkpoint.save(*checkpoint.load(FIXTURES / request.param), path)
    return contents(path)


def contents(folder: Path) -> Contents:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Trial:
    """Loads changed folders. Each must be refused in one sentence that names it, or be the same model."""

    def __init__(self, sound: Contents, folder: Path):
        self.sound, self.folder = sound, folder
        self.model, self.tokenizer = self.load(sound)

    def load(self, changed: Contents):
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for name, data in changed.items():
            (self.folder / name).mkdir() if data is None else (self.folder / name).write_bytes(data)
        return checkpoint.load(self.folder)

    def refuses(self, what: object, **files: bytes | None) -> bool:
        """Is the folder with these files instead refused? Their names are without what follows the dot."""
        names = {name.split(".")[0]: name for name in self.sound}
        return self.refuses_all(what, self.sound | {names[name]: data for name, data in files.items()})

    def refuses_all(self, what: object, changed: Contents) -> bool:
        """Is a folder of these files refused?"""
        try:
            model, tokenizer = self.load(changed)
        except ValueError as error:
            said = str(error)
            assert str(self.folder) in said and said.isprintable() and len(said) < 600 and "Traceback" not in said, (what, said)
            return True
        except BaseException as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        assert same(model.state_dict(), self.model.state_dict()), what
        if changed.get(CONFIG) == self.sound[CONFIG]:
            assert model.config == self.model.config, what
        if changed.get(TOKENIZER) == self.sound[TOKENIZER]:
            assert tokenizer.backend.to_str() == self.tokenizer.backend.to_str(), what
        return False


@pytest.fixture
def trial(sound, tmp_path) -> Trial:
    return Trial(sound, tmp_path / "model")


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


@pytest.mark.parametrize("kind", ACCIDENTS)
def test_accidents_to_the_weights(trial, kind):
    """What happens to the numbers is always noticed, what happens to the header at least where it matters."""
    data, dice, noticed = trial.sound[WEIGHTS], random.Random(kind), 0
    end = header_end(data)
    for i in range(6):
        changed = accident(kind, data, end, len(data), dice)
        assert trial.refuses((kind, i), model=changed) == (changed != data)
    for i in range(8):
        noticed += trial.refuses((kind, "header", i), model=accident(kind, data, 0, dice.choice([9, end]), dice))
    assert noticed >= 3


@pytest.mark.parametrize("kind", ACCIDENTS)
def test_accidents_to_the_other_files(trial, kind):
    dice = random.Random(kind)
    for name in ("config", "tokenizer"):
        data = trial.sound[f"{name}.json"]
        for i in range(8):
            trial.refuses((kind, name, i), **{name: accident(kind, data, 0, len(data), dice)})


def with_header(data: bytes, header: dict) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[header_end(data) :]


def alike(header: dict) -> list[tuple[str, str]]:
    """Pairs of tensors of one shape, which could be taken for each other."""
    names = [name for name in header if name != "__metadata__"]
    return [(a, b) for a in names for b in names if a < b and header[a]["shape"] == header[b]["shape"]]


def edits(header: dict, dice: random.Random):
    """(What is changed, the new header, whether that means the same as before.)"""
    for a, b in dice.sample(alike(header), 6):
        yield f"{a} and {b} swapped", header | {a: header[b], b: header[a]}, False
        yield f"{b} is {a}", header | {b: header[a]}, False
    names = [name for name in header if name != "__metadata__"]
    for name in dice.sample(names, 6):
        entry, others = header[name], {key: value for key, value in header.items() if key != name}
        start, end = entry["data_offsets"]
        yield f"{name} renamed", others | {f"{name}s": entry}, False
        yield f"{name} renamed oddly", others | {"\x1b[31m\n" + "x" * 10**4: entry}, False
        yield f"no {name}", others, False
        for dtype in ("F16", "BF16", "F64", "I32", "U8", "F8_E4M3", "X", 3, None):
            yield f"{name} as {dtype}", header | {name: entry | {"dtype": dtype}}, False
        for shape in ([], entry["shape"] * 2, [0], [-1], [2**62, 4], [end - start], [10**30], None, "16", [1, *entry["shape"]]):
            yield f"{name} as {shape}", header | {name: entry | {"shape": shape}}, False
        for offsets in ([0, end - start + 4], [end, start], [start + 4, end + 4], [start, 2**63], [start], None, [0, 0], [-1, 3]):
            yield f"{name} at {offsets}", header | {name: entry | {"data_offsets": offsets}}, False
        yield f"half of {name}", header | {name: entry | {"dtype": "F16"}, "rest": entry | {"data_offsets": [0, 0]}}, False
    metadata = header["__metadata__"]
    wrong = [json.dumps(dict.fromkeys(names, 7)), json.dumps(names)]
    for value in ("[]", "3", "null", "{", "", "{}", '{"a": 1}', "[" * 10**5, *wrong):
        yield f"checksums {value[:9]}", header | {"__metadata__": metadata | {"crc32": value}}, False
    for value in ({}, {"format": "pt"}, metadata | {"format": "tf"}):
        yield f"metadata {value}"[:40], header | {"__metadata__": value}, True
    for value in (3, [], {"crc32": {}}, None):
        yield f"metadata {value}", header | {"__metadata__": value}, value is None


def test_edited_headers(trial):
    data = trial.sound[WEIGHTS]
    header = json.loads(data[8 : header_end(data)])
    for what, changed, equal in edits(header, random.Random(0)):
        assert trial.refuses(what, model=with_header(data, changed)) == (not equal), what


@pytest.mark.parametrize("content", [b"", bytes(8), bytes(100), b"\xff" * 8, b"\xff" * 100, (2**40).to_bytes(8, "little") + b"{}",
                                     (2).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]",
                                     (10**5).to_bytes(8, "little") + b"[" * 10**5, b"version https://git-lfs"])
def test_files_of_something_else(trial, content):
    for name in ("model", "config", "tokenizer"):
        assert trial.refuses(name, **{name: content})


def test_edited_configs(trial):
    """Any value of another type, size or sign under any key, or none: another model is never made of these weights."""
    config, dice = json.loads(trial.sound[CONFIG]), random.Random(0)
    for key, old in config.items():
        values = [None, True, "x", [], {}, -1, 0, 3, 10**12, 10**30, 0.5, math.nan]
        for value in dice.sample(values, 5) + ([2 * old] if type(old) is int else []):
            trial.refuses((key, value), config=json.dumps(config | {key: value}).encode())
        trial.refuses(f"no {key}", config=json.dumps({k: v for k, v in config.items() if k != key}).encode())


def test_missing_renamed_and_odd_files(trial):
    unused = "tokenizer_config.json"  # by us, where there is a tokenizer.json
    for name, data in trial.sound.items():
        others = {key: value for key, value in trial.sound.items() if key != name}
        for what, changed in {"gone": {}, "empty": {name: b""}, "a folder": {name: None}, "renamed": {f"{name}.bak": data},
                              "old name": {"pytorch_model.bin": data}}.items():
            assert trial.refuses_all((name, what), others | changed) == (name != unused), (name, what)
    for one in (WEIGHTS, CONFIG, TOKENIZER):
        for other in (WEIGHTS, CONFIG, TOKENIZER):
            assert trial.refuses_all((one, other), trial.sound | {one: trial.sound[other]}) == (one != other)


# damaged in a certain way


def test_a_folder_that_is_not_there(tmp_path):
    refused(tmp_path / "nowhere", "nowhere is not a folder")


def test_a_file_is_no_folder(folder):
    refused(folder / CONFIG, "config.json is not a folder")


def test_a_hub_id_that_cannot_be_had(tmp_path, monkeypatch):
    def offline(*arguments, **settings):
        raise ConnectionError("no network")
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    refused("nobody/nothing", "nobody/nothing is no folder", "could not be downloaded")


@pytest.mark.parametrize("name, words", [(CONFIG, "config.json is missing"), (WEIGHTS, "model.safetensors is missing"),
                                         (TOKENIZER, "has no tokenizer: neither tokenizer.json")])
def test_a_missing_file(folder, name, words):
    (folder / name).unlink()
    refused(folder, str(folder), words)


def test_missing_and_unexpected_tensors_are_named(folder):
    change_weights(folder, **{Q: None, "encoder.block.7.layer.0.layer_norm.weight": torch.ones(16)})
    refused(folder, WEIGHTS, f"missing {Q}", "unexpected encoder.block.7")
    change_config(folder, num_layers=9)
    refused(folder, WEIGHTS, "does not fit its config.json", "missing", "more")
    change_weights(folder, **{"a\x1b[31m\n" + "x" * 10**4: torch.ones(1)})
    refused(folder, WEIGHTS, "unexpected a [31m x")


@pytest.mark.parametrize("shapes, named", [
    ({Q: (16, 8)}, f"{Q} is [16, 8], not [16, 16]"),
    ({"shared.weight": (15, 16)}, "shared.weight is [15, 16], not [16, 16]"),
    ({K: (16, 15)}, f"{K} is [16, 15]"),
    ({K: (15, 16), V: (17, 16)}, f"{K} is [15, 16]"),  # stacked, these would have the right shape
    ({Q: ()}, f"{Q} is []")])
def test_a_tensor_of_a_wrong_shape(folder, shapes, named):
    change_weights(folder, **{name: torch.zeros(shape) for name, shape in shapes.items()})
    refused(folder, WEIGHTS, named)


@pytest.mark.parametrize("dtype, kind", [(torch.int32, "I32"), (torch.uint8, "U8"), (torch.bool, "BOOL"), (torch.float64, "F64"),
                                         (torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2"),
                                         (torch.complex64, "C64")])
def test_a_tensor_of_other_numbers(folder, dtype, kind):
    change_weights(folder, **{K: load_file(folder / WEIGHTS)[K].to(dtype)})
    refused(folder, WEIGHTS, f"{K} holds {kind}, not floating-point numbers of 32 or 16 bits")


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
    assert not (tmp_path / "trace").exists() and not (folder / WEIGHTS).exists()


@pytest.mark.parametrize("value", [torch.ones(3), [torch.ones(3)], {"shared.weight": 3}, {3: torch.ones(3)}])
def test_a_pytorch_model_bin_without_named_tensors(folder, value):
    torch.save(value, to_pickle(folder))
    refused(folder, "pytorch_model.bin does not hold")


@pytest.mark.parametrize("value", [torch.eye(3).to_sparse(), torch.ones(3, device="meta"), torch.ones(3, dtype=torch.complex128)])
def test_a_pytorch_model_bin_with_odd_tensors(folder, value):
    torch.save({"shared.weight": value}, to_pickle(folder))
    refused(folder, "pytorch_model.bin cannot be converted to model.safetensors: ")
    assert not (folder / WEIGHTS).exists()


@pytest.mark.parametrize("kept", [0, 10, -10])
def test_a_truncated_pytorch_model_bin(folder, kept):
    path = to_pickle(folder)
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, "pytorch_model.bin is damaged")


# from the command line


def break_weights(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-7] ^= 4
    (folder / WEIGHTS).write_bytes(data)


BREAKS = {"model.safetensors is damaged": break_weights,
          "model.safetensors does not fit its config.json": lambda folder: change_config(folder, d_model=32),
          "config.json is missing": lambda folder: (folder / CONFIG).unlink(),
          "tokenizer.json is not a readable tokenizer": lambda folder: (folder / TOKENIZER).write_text("{}")}


@pytest.mark.parametrize("sentence", BREAKS)
def test_the_command_says_what_is_damaged(folder, monkeypatch, sentence):
    BREAKS[sentence](folder)
    monkeypatch.setattr(sys, "argv", ["eval.py", "--task", "addition", "--model", str(folder), "--device", "cpu"])
    with pytest.raises(SystemExit) as stopped:
        guarded(importlib.import_module("eval").main)
    assert stopped.value.code.startswith(f"error: {folder}/{sentence}") and stopped.value.code.isprintable()


def test_the_real_command_ends_without_a_traceback(folder):
    break_weights(folder)
    command = [sys.executable, "eval.py", "--task", "addition", "--model", str(folder), "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith(f"error: {folder / WEIGHTS} is damaged") and len(done.stderr.splitlines()) == 1

