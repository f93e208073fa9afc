"""What README says can be typed can be typed: its commands have flags that exist, its Python runs when pasted."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from bench.tables import TABLES
from minicd import losses
from minicd.labels import LabelBatch
from minicd.tasks.report import rebuild
from minicd.tasks.settings import guarded

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"python (?:train|eval)\.py[^`#\n]*", README)))
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_is_understood(command, monkeypatch, tmp_path):
    """Everything up to the work itself: tasks, flags, settings, presets."""
    called = []
    monkeypatch.chdir(tmp_path)  # the repository may have runs of these names
    monkeypatch.setattr(train, "train", lambda *how, **more: called.append(how))
    monkeypatch.setattr(evaluation, "load", lambda *_: (None, None))
    monkeypatch.setattr(evaluation, "rebuild", lambda *how: called.append(how))
    for task in evaluation.TASKS.values():
        monkeypatch.setattr(task, "ask", lambda *words: called.append(words) or "")
        monkeypatch.setattr(task, "examine", lambda *words: called.append(words) or "")
    monkeypatch.setitem(losses.LOSSES, "brier", losses.Loss(losses.hard))
    words = shlex.split(command)[1:]
    monkeypatch.setattr(sys, "argv", words)
    guarded((train if words[0] == "train.py" else evaluation).main)
    assert len(called) == 1


def test_readme_has_the_commands_that_matter_and_is_short():
    assert any("--task addition" in c for c in COMMANDS) and any("--ask" in c for c in COMMANDS)
    assert "python -m pytest" in README
    assert len(README.encode()) <= 13_000 and README.count("\n") <= 200


def test_the_worked_example_of_a_loss_is_the_brier_score(monkeypatch):
    monkeypatch.setattr(losses, "LOSSES", dict(losses.LOSSES))
    exec(next(code for code in PYTHON if "def brier" in code), {})
    logits = torch.tensor([[[1.0, 0.0, -1.0]]])
    labels = LabelBatch(tokens=torch.tensor([[0]]), ids=torch.tensor([[[0, 2]]]), weights=torch.tensor([[[0.75, 0.25]]]),
                        mask=torch.ones(1, 1, dtype=torch.bool))
    expected = (logits[0, 0].softmax(-1) - torch.tensor([0.75, 0.0, 0.25])).square().sum()
    assert losses.LOSSES["brier"](logits, labels).item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_python_example_runs_when_pasted():
    code = next(code for code in PYTHON if "Context(" in code)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^task : ([a-h ]+) → (.*)$", done.stdout, re.M)
    assert len(lines) == 3 and any(answer.split() == asked.split()[::-1] for asked, answer in lines)


def test_every_link_points_to_something():
    missing = [target for target in re.findall(r"\]\(([^)#:]+)\)", README) if not (ROOT / target).exists()]
    assert not missing


def test_the_tables_are_those_of_the_records(tmp_path):
    """README and results/README.md are what `eval.py --report` makes of results/*.json."""
    (tmp_path / "results").mkdir()
    for path in (ROOT / "results").iterdir():
        (tmp_path / "results" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "README.md").write_text(README)
    rebuild(tmp_path, evaluation.TASKS, TABLES)
    for name in ("README.md", "results/README.md"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"{name}: run python eval.py --report"
