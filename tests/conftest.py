"""For every test: the repository on the path, one thread (results do not depend on the machine's load)."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

torch.set_num_threads(1)

SMOLLM2 = Path(__file__).resolve().parent.parent / "data" / "smollm2"


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "smollm2: needs the pretrained model, data/smollm2")


def pytest_collection_modifyitems(items) -> None:
    if not SMOLLM2.exists():
        skip = pytest.mark.skip(reason="the pretrained model is not here: python data/smollm2.py makes data/smollm2")
        for item in items:
            if item.get_closest_marker("smollm2"):
                item.add_marker(skip)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sound folder, for a test to damage."""
    from helpers import tiny_t5

    from minicd.hf import checkpoint
    from minicd.tokenizer import word_tokenizer
    path = tmp_path / "model"
    checkpoint.save(tiny_t5(16), word_tokenizer(["one", "two"]), path)
    return path
