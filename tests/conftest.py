"""For every test: the repository on the path, one thread (results do not depend on the machine's load), quiet fp32."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)


@pytest.fixture
def fp32(monkeypatch):
    """generate() and score() in fp32, also on processors with bf16 units: for tight comparisons."""
    monkeypatch.setattr("minicd.sampling.autocast", lambda device, precision="auto": contextlib.nullcontext())
