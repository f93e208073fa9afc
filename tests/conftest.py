"""For every test: the repository on the path, one thread (results do not depend on the machine's load)."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sound folder, for a test to damage."""
    from helpers import tiny_t5

    from minicd.hf import checkpoint
    from minicd.tokenizer import word_tokenizer
    path = tmp_path / "model"
    checkpoint.save(tiny_t5(16), word_tokenizer(["one", "two"]), path)
    return path
