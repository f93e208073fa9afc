"""Settings check and explain themselves: every option of every task, in Python and on the command line."""

import dataclasses
import math
import sys

import pytest

import eval as evaluation
import train
from minicd.tasks.explanations import ExplanationSettings
from minicd.tasks.settings import KINDS, check, differences, flag, option

CLASSES = {f"{name}.{kind.__name__}": kind for name, task in train.TASKS.items() for kind in (task.Settings, task.Eval)}
CLASSES |= {"train": train.Flags, "eval": evaluation.Flags}
FIELDS = [pytest.param(kind, field, id=f"{name}-{field.name}") for name, kind in CLASSES.items()
          for field in dataclasses.fields(kind)]


def refused(kind: type, name: str, value: object) -> str:
    """The sentence that names the flag."""
    with pytest.raises(ValueError) as error:
        settings = kind(**{name: value})
        check(settings)
    assert str(error.value).startswith(flag(name) + " "), error.value
    return str(error.value)


@pytest.mark.parametrize("kind, field", FIELDS)
def test_an_option_explains_itself_and_refuses_what_cannot_be(kind, field):
    about, of = field.metadata, KINDS[field.type.removesuffix(" | None")]
    assert about["help"] and about["help"][0] != " "
    many = field.type.startswith("list")

    def value(x):
        return [x] if many else x
    if of in (int, float):
        assert "it must be" in refused(kind, field.name, value("many"))
        for x in (math.nan, math.inf) if of is float else ():
            assert "it must be" in refused(kind, field.name, value(x))
        outside = [about["least"] - 1] * (about["least"] is not None) if about["least"] is not None else []
        outside += [about[edge] for edge in ("above", "below") if about[edge] is not None]
        outside += [about["most"] + 1] if about["most"] is not None else []
        assert outside, "a number without any limit"
        for x in outside:
            assert "it must be" in refused(kind, field.name, value(of(x)))
    elif of is str and about["choices"]:
        assert "choose from" in refused(kind, field.name, "no such thing")
    else:
        assert "it must be of type" in refused(kind, field.name, value(7))


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)
def test_the_defaults_are_sound(kind):
    check(kind())


@pytest.mark.parametrize("task", train.TASKS)
@pytest.mark.parametrize("program", ["train", "eval"])
def test_help_tells_of_this_task_alone(program, task, monkeypatch, capsys):
    module = {"train": train, "eval": evaluation}[program]
    monkeypatch.setattr(sys, "argv", [f"{program}.py", "--task", task, "--help"])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    own = train.TASKS[task].Settings if program == "train" else train.TASKS[task].Eval
    wanted = {flag(field) for kind in (module.Flags, own) for field in dataclasses.fields(kind)}
    listed = {word for line in said.split("options:")[1].splitlines() for word in line.split()[:1] if word.startswith("--")}
    assert listed == wanted


def test_help_has_the_defaults_of_the_task(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--task", "explanations", "--help"])
    with pytest.raises(SystemExit):
        train.main()
    said = " ".join(capsys.readouterr().out.split())
    assert "default: 24 tasks" in said and "default: 512 inputs" in said and "--shots" not in said


def test_a_run_shows_what_differs():
    assert differences(ExplanationSettings()) == []
    assert differences(ExplanationSettings(tasks=5, on_policy=True)) == ["--on-policy", "--tasks 5"]
    assert differences(ExplanationSettings(tasks=5), {"tasks": 5}) == []
    assert differences(ExplanationSettings(), {"tasks": 5}) == ["--tasks 24"]


def test_an_option_of_ones_own():
    @dataclasses.dataclass
    class Mine:
        share: "float" = option(0.5, "a share", above=0, below=1)
        words: "list[int]" = option(lambda: [1, 2], "numbers", least=1)
    check(Mine())
    with pytest.raises(ValueError, match="--share 1.0: it must be more than 0 and less than 1"):
        check(Mine(share=1.0))
    with pytest.raises(ValueError, match="--words 0: it must be at least 1"):
        check(Mine(words=[3, 0]))
