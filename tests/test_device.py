"""The device and the precision that are asked for, where they are not there; and texts that could steer a terminal."""

from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import tiny_t5

from minicd.distill import Context, PracticeSettings, identity
from minicd.hf.checkpoint import load
from minicd.runtime.device import find_device, pick_device, pick_precision
from minicd.runtime.progress import printable
from minicd.tasks.folder import RunFolder
from minicd.tasks.item import one_item
from minicd.tasks.run import Experiment, Stage
from minicd.tokenizer import word_tokenizer

FOLDER = Path(__file__).parent / "fixtures" / "t5-v1.0"


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("name, sentence", [
    ("cuda", "cuda: this PyTorch sees no CUDA device"), ("cuda:3", "cuda:3: this PyTorch sees no CUDA device"),
    ("meta", "meta: models run on cpu and cuda only"), ("mps", "mps: models run on cpu and cuda only"),
    ("tpu", "tpu: there is no such device"), ("cuda:x", "cuda:x: there is no such device"), ("", ": there is no such device")])
def test_a_device_that_is_not_there_is_named(no_cuda, name, sentence):
    with pytest.raises(ValueError, match=f"^--device {sentence}"):
        pick_device(name)
    with pytest.raises(ValueError, match=f"^{sentence}"):
        load(FOLDER, device=name)


def test_devices_that_are_there(no_cuda):
    assert pick_device() == pick_device("cpu") == find_device(torch.device("cpu")) == torch.device("cpu")
    assert next(load(FOLDER, device=torch.device("cpu"))[0].parameters()).device.type == "cpu"


def test_a_number_beyond_the_last_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="--device cuda:2: there are only 2 CUDA devices"):
        pick_device("cuda:2")


@pytest.mark.parametrize("units", [True, False])
def test_auto_is_bf16_on_cuda_where_it_is_not_emulated(monkeypatch, units):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: units or including_emulation)
    assert pick_precision(torch.device("cuda")) == ("bf16" if units else "fp32")
    assert pick_precision(torch.device("cuda"), "bf16") == "bf16"


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
def test_auto_is_bf16_on_a_cpu_that_has_and_may_use_its_instructions(monkeypatch, instructions, capability):
    """ATEN_CPU_CAPABILITY may forbid them: then PyTorch's attention in bf16 ends with an error."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    expected = "bf16" if instructions and capability == "AVX512" else "fp32"
    assert pick_precision(torch.device("cpu")) == expected


def test_what_could_steer_a_terminal_is_escaped():
    text = "red \x1b[31m, a bell \x07, back\r\b, \u202eturned\u202c, \ud800, \x9b2J\nnext line, é 日本 😀"
    shown = printable(text)
    assert shown == ("red \\x1b[31m, a bell \\x07, back\\r\\x08, \\u202eturned\\u202c, \\ud800, \\x9b2J\nnext line, é 日本 😀")
    assert all(c.isprintable() or c == "\n" for c in shown)


def test_the_item_that_is_shown_whole_steers_no_terminal(tmp_path, capsys):
    """Its texts are those of a task file, or a model's."""
    item = partial(one_item, Context(lambda n, rng: ["a\x1b[2J"] * n, "say\x9b {}".format, "{}\r".format, identity),
                   word_tokenizer(["a", "say"]), tiny_t5(5), PracticeSettings(max_new_tokens=3), seed=0)
    experiment = Experiment(None, 0, RunFolder(tmp_path, torch.device("cpu")))
    stage = Stage("example", item, show=str)
    experiment.folder.keep("example", item(), None)
    experiment.tell(stage)
    said = capsys.readouterr().out
    assert "teacher prompt    say\\x9b a\\x1b[2J\n" in said and "student prompt    a\\x1b[2J\\r\n" in said
    assert all(c.isprintable() or c == "\n" for c in said)
