"""What README says can be typed can be typed: its commands have flags that exist, its Python runs."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from minicd import losses
from minicd.tasks.commands import guarded
from minicd.labels import LabelBatch

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"python (?:train|eval)\.py[^`#\n]*", README)))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_is_understood(command, monkeypatch):
    """Everything up to the work itself: tasks, flags, settings, presets."""
    called = []
    for task in train.TASKS.values():
        monkeypatch.setattr(task, "train", lambda settings, seeds, out, device, publish: called.append(settings))
    monkeypatch.setattr(evaluation, "load", lambda *_: (None, None))
    monkeypatch.setattr(evaluation, "rebuild_readme", lambda root: called.append(root) or [])
    for task in evaluation.TASKS.values():
        monkeypatch.setattr(task, "ask", lambda *words: called.append(words) or "")
        monkeypatch.setattr(task, "test", lambda *words: called.append(words))
    monkeypatch.setitem(losses.LOSSES, "brier", losses.hard)
    words = shlex.split(command)[1:]
    monkeypatch.setattr(sys, "argv", words)
    guarded((train if words[0] == "train.py" else evaluation).main)
    assert len(called) == 1


def test_readme_has_the_commands_that_matter():
    assert any("--task addition" in c for c in COMMANDS) and any("--ask" in c for c in COMMANDS)
    assert "python -m pytest" in README


def test_the_worked_example_of_a_loss_is_the_brier_score():
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "def brier" in block)
    names = {"LOSSES": {}}
    exec(code, names)
    logits = torch.tensor([[[1.0, 0.0, -1.0]]])
    labels = LabelBatch(tokens=torch.tensor([[0]]), ids=torch.tensor([[[0, 2]]]), weights=torch.tensor([[[0.75, 0.25]]]),
                        mask=torch.ones(1, 1, dtype=torch.bool))
    dense = torch.tensor([0.75, 0.0, 0.25])
    expected = (logits[0, 0].softmax(-1) - dense).square().sum()
    assert names["LOSSES"]["brier"](logits, labels).item() == pytest.approx(expected.item(), abs=1e-6)


def test_every_link_points_to_something():
    root = Path(__file__).resolve().parent.parent
    missing = [target for target in re.findall(r"\]\(([^)#:]+)\)", README) if not (root / target).exists()]
    assert not missing


def test_the_names_of_the_python_example_exist():
    import minicd
    names = [name for line in re.findall(r"from minicd import (.*)", README) for name in line.split(", ")]
    assert len(names) > 12 and all(hasattr(minicd, name) for name in names)
