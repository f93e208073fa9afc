"""Settings that explain and check themselves: a field with help, range and unit is a flag with its check."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import math
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, NoReturn

from ..distill import LABEL_KINDS, PracticeSettings
from ..losses import LOSSES, check_labels, label_kind
from ..runtime.device import PRECISIONS
from ..runtime.files import read_checked
from ..runtime.memory import out_of_memory
from ..runtime.progress import printable
from ..training import OPTIMISERS, FitSettings
from .record import ROOT

KINDS = {"int": int, "float": float, "str": str, "bool": bool, "list[int]": int}
LARGEST = 10**9  # of a whole number without a limit of its own: nobody waits for more


def option(default: Any, help: str, *, least: float | None = None, most: float | None = None,
           above: float | None = None, below: float | None = None, unit: str = "",
           choices: Iterable[str] | None = None, free: bool = False) -> Any:
    """A settings field: its help, range and unit. `free`: a rerun in the same folder may change it."""
    default = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**default, metadata={
        "help": help, "least": least, "most": most, "above": above, "below": below, "unit": unit,
        "choices": choices, "free": free})


def beside(path: str) -> str:
    """A path of this repository, wherever the program is started: data/… that is not here is beside the code.

    Else a default such as data/pocket would be looked for on the hub, where the name could be anybody's.
    """
    return str(ROOT / path) if path.startswith("data/") and not Path(path).exists() else path


def default_of(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default is MISSING else field.default


def flag(field: dataclasses.Field | str) -> str:
    """jsd_beta → --jsd-beta"""
    return "--" + getattr(field, "name", field).replace("_", "-")


def changes(settings: Any, there: dict[str, Any]) -> list[str]:
    """How settings that a rerun may not change differ from earlier ones; what those lack had its default."""
    fields = [field for field in dataclasses.fields(settings) if not field.metadata["free"]]
    here = json.loads(json.dumps({field.name: getattr(settings, field.name) for field in fields}))
    earlier = json.loads(json.dumps({field.name: default_of(field) for field in fields})) | there
    free = {field.name for field in dataclasses.fields(settings)} - set(here)
    return [f"{name} (there {earlier.get(name)!r}, now {here.get(name)!r})"
            for name in earlier if name not in free and earlier[name] != here.get(name)]


def check(settings: Any) -> None:
    """Raises ValueError, with the flag's name, for a setting of a wrong type, not finite, or out of range."""
    for field in dataclasses.fields(settings):
        given, name = getattr(settings, field.name), type_name(field)
        if name not in KINDS or (given is None and optional(field)):
            continue
        if name.startswith("list") and not isinstance(given, list):
            raise ValueError(f"{flag(field)} {given}: it must be a list")
        for value in given if name.startswith("list") else [given]:
            problem = what_is_wrong(value, KINDS[name], field.metadata)
            if problem:
                raise ValueError(f"{flag(field)} {value}: {problem}")


def annotation(field: dataclasses.Field) -> str:
    """The field's type as it is written; without `from __future__ import annotations` it is no string."""
    return field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)


def type_name(field: dataclasses.Field) -> str:
    """int | None → int"""
    return annotation(field).removesuffix(" | None")


def optional(field: dataclasses.Field) -> bool:
    return annotation(field).endswith(" | None")


def what_is_wrong(value: Any, kind: type, field: Any) -> str:
    """A clause that says what a value must be, or nothing."""
    known = isinstance(value, (int, float) if kind is float else kind)
    if not known or (isinstance(value, bool) and kind is not bool):
        return f"it must be of type {kind.__name__}"
    if field["choices"] and value not in field["choices"]:
        return f"choose from {', '.join(field['choices'])}"
    if kind in (int, float) and not (inside(value, field) and (kind is int or math.isfinite(value))):
        return f"it must be {range_of(field) or 'a finite number'}"
    if kind is int and field["most"] is None and abs(value) > LARGEST:
        return f"it must be at most {LARGEST:g}"
    return ""


def inside(value: float, field: Any) -> bool:
    least, most, above, below = (field[name] for name in ("least", "most", "above", "below"))
    return ((least is None or value >= least) and (most is None or value <= most)
            and (above is None or value > above) and (below is None or value < below))


def range_of(field: Any) -> str:
    """{'least': 1, 'most': 18} → 'at least 1 and at most 18'"""
    words = {"least": "at least", "above": "more than", "most": "at most", "below": "less than"}
    return " and ".join(f"{word} {field[name]:g}" for name, word in words.items() if field[name] is not None)


# --- What several experiments share ---


@dataclass
class RunSettings:
    """Settings of every experiment. A subclass may give its fields other defaults."""

    scale: str = option("pocket", "pocket, or another preset of the experiment: a wrong name gives the "
                        "list; flags change its settings")
    precision: str = option("auto", "bf16, fp32, or auto: what is fast on this machine; bf16-weights: not "
                            "just products, the weights, too, beside fp32 masters of those that learn",
                            choices=PRECISIONS)
    save_every: float = option(30.0, "between checkpoints, from which an interrupted run goes on", least=0,
                               unit="seconds", free=True)

    def __post_init__(self) -> None:
        check(self)


@dataclass
class DistillSettings(RunSettings):
    """How the student is trained. The paper: the loss empirical on 100 samples a label (section 2.4)."""

    model: str = option("data/pocket", "folder or hub id of the model to start from")
    loss: str = option("empirical", "by its name in losses.py; the paper's is empirical", choices=LOSSES)
    jsd_beta: float = option(0.5, "of the loss jsd: the teacher's weight β, between forward and reverse KL",
                             above=0, below=1)
    labels: str = option("auto", "form of soft labels: sampled, top, exact, or auto: what the loss needs",
                         choices=("auto", *LABEL_KINDS))
    label_samples: int = option(100, "size of a sampled label", least=1, most=10_000, unit="samples")
    label_top: int = option(16, "size of a top label", least=1, most=1_000_000, unit="likeliest tokens")
    warmup: float = option(0.02, "share of the steps with a growing learning rate", least=0, most=1)
    decay: float = option(0.3, "share of the steps, at the end, with a falling rate", least=0, most=1)
    clip: float = option(1.0, "largest gradient norm; 0: no clipping", least=0)
    optimiser: str = option("adamw", "adamw (the paper's), or muon inside the layers", choices=OPTIMISERS)
    lora_rank: int = option(0, "of low-rank adapters, which alone learn: student and teacher then share one "
                            "copy of the weights; 0: all weights learn", least=0, most=4096)
    micro_batch: int = option(0, "rows of a batch whose activations are in memory together; 0: all, "
                              "on the CPU what is fastest", least=0)
    checkpointing: bool = option(False, "compute each block's activations twice, to save memory")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_labels(self.loss, self.practice_settings(1).labels)

    def practice_settings(self, max_new_tokens: int) -> PracticeSettings:
        kind = label_kind(self.loss) if self.labels == "auto" else self.labels
        return PracticeSettings(kind, self.label_samples, self.label_top, max_new_tokens=max_new_tokens,
                                precision=self.precision)

    def fit_settings(self, **changes: Any) -> FitSettings:
        """The experiment's settings of the same names as fields of FitSettings, and these changes."""
        names = [field.name for field in dataclasses.fields(FitSettings) if hasattr(self, field.name)]
        return FitSettings(**({name: getattr(self, name) for name in names} | changes))


@dataclass
class EvalSettings:
    """What eval.py needs to know to examine a model, whatever the experiment."""

    precision: str = option("auto", "bf16, fp32, or auto: what is fast on this machine", choices=PRECISIONS)

    def __post_init__(self) -> None:
        check(self)


# --- Flags ---


class Parser(argparse.ArgumentParser):
    """An argument parser that knows which flag was meant."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"unknown argument {unknown[0]}{near(unknown[0].split('=')[0], flags)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        sys.exit(printable(f"{self.prog}: {message} (see --help)"))


def near(word: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def add_flags(parser: argparse._ActionsContainer, settings: type,
              preset: dict[str, Any] | None = None) -> None:
    """A flag for every field. Its help has explanation, range, unit and default (`preset`'s or its own)."""
    for field in dataclasses.fields(settings):
        default, text = (preset or {}).get(field.name, default_of(field)), field.metadata["help"]
        if type_name(field) == "bool":
            parser.add_argument(flag(field), action="store_true", default=None, help=text)
            continue
        usual = "" if default in (None, "") else f"default: {as_text(default)} {field.metadata['unit']}"
        details = [range_of(field.metadata), usual]
        text += f" ({'; '.join(detail.strip() for detail in details if detail)})" if any(details) else ""
        choices = list(field.metadata["choices"]) if field.metadata["choices"] else None
        many = {"nargs": "+"} if type_name(field).startswith("list") else {}
        parser.add_argument(flag(field), type=KINDS[type_name(field)], choices=choices,
                            metavar=field.name.upper(), help=text.replace("%", "%%"), **many)


def as_text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def command_line(
        description: str, flags: type, tasks: dict[str, Any],
        settings_of: Callable[[Any], tuple[type, dict[str, Any]]]) -> tuple[argparse.Namespace, Any, Any]:
    """The arguments, the checked `flags` of every task, and the chosen entry of `tasks`.

    `settings_of` gives the task's own settings and their preset. Raises ValueError for an unknown task.
    """
    parser = Parser(description)
    add_flags(parser, flags)
    name = task_name(parser, flags, tasks)
    if name not in tasks:
        raise ValueError(f"there is no task {name!r}{near(name, tasks)}; tasks: {', '.join(tasks)}")
    add_flags(parser.add_argument_group(f"settings of {name}"), *settings_of(tasks[name]))
    arguments = parser.parse_args()
    return arguments, settings_from(arguments, flags), tasks[name]


def task_name(parser: Parser, flags: type, tasks: dict[str, Any]) -> str:
    """Look for --task before the other flags are known, since they depend on it."""
    words = sys.argv[1:]
    for i, word in enumerate(words):
        if word.startswith("--task="):
            return word.removeprefix("--task=")
        if word == "--task" and i + 1 < len(words):
            return words[i + 1]
    if flags().task:
        return flags().task
    parser.parse_args()  # shows --help, or names an unknown flag
    parser.error(f"--task is missing; tasks: {', '.join(tasks)}")


def settings_from(arguments: argparse.Namespace, settings: type, *presets: dict[str, Any]) -> Any:
    """Defaults, then presets in order, then the command line's values. Raises ValueError as `check` does."""
    merged = {name: value for preset in presets for name, value in preset.items()}
    names = [field.name for field in dataclasses.fields(settings)]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    made = settings(**(merged | given))
    check(made)
    return made


def as_in_run(settings: Any, run: Path) -> Any:
    """What was left open (None) becomes as in the run of this folder, where it says so.

    Raises ValueError where its settings.json is damaged.
    """
    file, fields = run / "settings.json", dataclasses.fields(settings)
    open_ones = [field for field in fields if optional(field) and getattr(settings, field.name) is None]
    if not open_ones or not file.exists():
        return settings
    kinds = {field.name: KINDS[type_name(field)] for field in open_ones}
    known = read_checked(file, kinds, f"say {' and '.join(map(flag, open_ones))}")
    return dataclasses.replace(settings, **{name: known[name] for name in kinds if name in known})


def differences(settings: Any, *presets: dict[str, Any]) -> list[str]:
    """The flags of the settings that are not what the presets give, for a run to show."""
    usual = type(settings)(**{name: value for preset in presets for name, value in preset.items()})
    pairs = [(field, getattr(settings, field.name)) for field in dataclasses.fields(settings)]
    return [flag(field) + ("" if value is True else f" {as_text(value)}") for field, value in pairs
            if value != getattr(usual, field.name)]


def guarded(main: Callable[[], None]) -> None:
    """Run main. What a user can cause or mend ends in one sentence instead of a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from the last checkpoint")
    except (ValueError, FloatingPointError) as error:
        sys.exit(printable(f"error: {error}"))
    except OSError as error:
        sys.exit(printable(f"error: {error.filename or 'writing'}: {error.strerror}" if error.strerror
                           else f"error: {error}"))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        sys.exit("error: memory ran out; smaller batches need less, and --jobs 1 does, too")
