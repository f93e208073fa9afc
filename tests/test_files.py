"""Files that minicd wrote carry checksums: no changed bit goes unseen, and files of others are still read."""

import errno
import json
import random
from pathlib import Path

import pytest
import torch
from helpers import tiny_t5
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minicd.labels import Examples, Ragged, SoftLabels
from minicd.rounds import load_state
from minicd.runtime import files
from minicd.training import FitSettings, Run

SETTINGS = FitSettings(precision="fp32", loss="empirical")


def practice_set() -> Examples:
    labels = SoftLabels.sample(torch.randn(9, 12, generator=torch.Generator().manual_seed(0)), 20, torch.Generator())
    return Examples(Ragged.of([[1, 2], [3], [4, 5, 6]]), Ragged.of([[7, 8, 1], [9, 1], [2, 3, 4, 1]]), labels,
                    Ragged.of_texts(["a b", "é", ""]))


def write_practice(path: Path) -> None:
    practice_set().save(path, {"task": "test"})


def write_progress(path: Path) -> None:
    run = Run(tiny_t5(), SETTINGS, 40, 0, path)
    run.history = [2.5, 1.25]
    run.save()


def write_student(path: Path) -> None:
    files.atomic_safetensors(path, tiny_t5().state_dict())


def read_practice(path: Path) -> dict[str, torch.Tensor]:
    items = Examples.load(path)
    items.save(path.with_name("again"))
    return load_file(path.with_name("again"))


def read_progress(path: Path) -> dict[str, torch.Tensor]:
    run = Run(tiny_t5(seed=1), SETTINGS, 40, 0, path)
    return run.model.state_dict() | {"history": torch.tensor(run.history)}


def read_student(path: Path) -> dict[str, torch.Tensor]:
    load_state(model := tiny_t5(seed=1), path, "")
    return model.state_dict()


KINDS = {"practice": (write_practice, read_practice), "progress": (write_progress, read_progress),
         "student": (write_student, read_student)}


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_goes_unseen(kind, tmp_path):
    """In the numbers each is refused; in the header it is refused or changes nothing."""
    write, read = KINDS[kind]
    path, dice = tmp_path / "file", random.Random(kind)
    write(path)
    data, sound = path.read_bytes(), read(path)
    for start, end in ((header_end(data), len(data)), (0, header_end(data))):
        for _ in range(60):
            at = dice.randrange(start, end)
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :])
            try:
                found = read(path)
            except ValueError as error:
                assert str(path) in str(error) and len(str(error).splitlines()) == 1
                continue
            assert start == 0, f"byte {at} of {len(data)}"
            assert found.keys() == sound.keys() and all(torch.equal(found[k], sound[k]) for k in sound), at


def rewrite(path: Path, **metadata) -> None:
    """Other metadata, with the tensors as they are; a value of None leaves a key out."""
    with safe_open(path, "pt") as file:
        old = file.metadata()
    save_file(load_file(path), path, {k: v for k, v in (old | metadata).items() if v is not None})


@pytest.mark.parametrize("kind", KINDS)
def test_files_without_checksums_are_read(kind, tmp_path):
    """Those of others, and those from before checksums."""
    write, read = KINDS[kind]
    write(tmp_path / "file")
    sound = read(tmp_path / "file")
    rewrite(tmp_path / "file", crc32=None, header_crc32=None)
    assert all(torch.equal(a, b) for a, b in zip(read(tmp_path / "file").values(), sound.values(), strict=True))


@pytest.mark.parametrize("metadata", [{"history": "[20, [2.5, 1.0]]"}, {"crc32": None}, {"crc32": "{}"}, {"crc32": "["},
                                      {"more": "x"}, {"header_crc32": "7"}])
def test_metadata_is_covered(tmp_path, metadata):
    write_progress(tmp_path / "file")
    rewrite(tmp_path / "file", format="np")  # which other programs may rewrite
    read_progress(tmp_path / "file")
    rewrite(tmp_path / "file", **metadata)
    with pytest.raises(ValueError, match="file is damaged .*; delete it to train this stage anew"):
        read_progress(tmp_path / "file")


def test_memory_that_runs_out_is_no_damaged_file(tmp_path):
    """Else one would delete a good checkpoint, as the error advises."""
    files.atomic_safetensors(path := tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    for error in (MemoryError, torch.OutOfMemoryError):
        with pytest.raises(error), files.open_safetensors(path):
            raise error("out of memory")


def test_a_checkpoint_of_another_model_is_one_sentence(tmp_path):
    write_progress(tmp_path / "file")
    with pytest.raises(ValueError, match="file is damaged .*; delete it to train this stage anew"):
        Run(tiny_t5(8), SETTINGS, 40, 0, tmp_path / "file")


@pytest.mark.parametrize("name, value, problem", [
    ("prompts.starts", [0, 2, 2**50, 6], "prompts.starts does not fit prompts.values"),
    ("prompts.starts", [0, 2, 1, 6], "prompts.starts does not fit"), ("prompts.starts", [1, 2, 3, 6], "prompts.starts does not"),
    ("answers.starts", [0, 3, 5, 8], "answers.starts does not fit"), ("answers.starts", [0, 9], "different numbers of prompts, answers"),
    ("prompts.starts", [], "prompts.starts is no list"), ("prompts.values", [1.0] * 6, "prompts.values is no list of whole numbers"),
    ("inputs.values", [255] * 5, "utf-8"), ("answers.values", [[1] * 9], "answers.values is no list"),
    ("labels.starts", [0, 1], "labels.starts does not fit"), ("labels.weights", [1], "labels.weights does not fit labels.ids"),
    ("labels.weights", -1, "labels.weights holds no counts"), ("labels.weights", float("nan"), "holds no probabilities"),
    ("labels.weights", None, "labels.weights")])
def test_a_practice_set_that_cannot_be(tmp_path, name, value, problem):
    """From a file without checksums; nothing is allocated by a length that is not there."""
    write_practice(tmp_path / "file")
    tensors = load_file(tmp_path / "file")
    old = tensors.pop(name)
    if value is not None:
        tensors[name] = torch.tensor(value) if isinstance(value, list) else torch.full(old.shape, value)
        tensors[name] = tensors[name].long() if value == [] else tensors[name]
    save_file(tensors, tmp_path / "file")
    with pytest.raises(ValueError, match=f"file is damaged, or not a practice set .*{problem}.*; delete it to practise anew"):
        Examples.load(tmp_path / "file")


def test_json_with_a_checksum(tmp_path):
    path, values = tmp_path / "file.json", {"minutes": 1.5, "hardware": "é", "losses": [2.0, 1.0]}
    kinds = {"minutes": (int, float), "hardware": str, "losses": list}
    files.write_checked(path, values)
    assert files.read_checked(path, kinds, "") == values
    text = path.read_text()
    for old, new in (("1.5", "1.6"), ("é", "e"), ("2.0", "2.5"), ("minutes", "minuter")):
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match="file.json is damaged: it is not what was written; delete it"):
            files.read_checked(path, kinds, "delete it")
    for wrong in ("[]", "3", "null", '{"minutes": "long"}', '{"losses": 3}', '{"losses": [[]]}', '{"hardware": {}}', "{"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="file.json is damaged: .*; delete it"):
            files.read_checked(path, kinds, "delete it")
    path.write_text('{"minutes": 3, "more": []}')  # by hand, or from before checksums
    assert files.read_checked(path, kinds, "", has="minutes") == {"minutes": 3, "more": []}
    path.write_text('{"more": []}')  # of something else
    with pytest.raises(ValueError, match="file.json is damaged: it is not what was written"):
        files.read_checked(path, kinds, "", has="minutes")


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError) as error:
        files.atomic_json(tmp_path / "file.json", {})
    assert error.value.filename == str(tmp_path / "file.json") and not list(tmp_path.iterdir())


def test_checksums_in_old_models_are_used(tmp_path):
    """They lack the header's: a changed tensor is noticed all the same."""
    path = tmp_path / "file"
    write_student(path)
    rewrite(path, header_crc32=None)
    read_student(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors | {"shared.weight": tensors["shared.weight"] + 1}, path, metadata)
    with pytest.raises(ValueError, match="shared.weight is not what was written"):
        read_student(path)
    assert set(json.loads(metadata["crc32"])) == set(tensors)
