"""What the experiments on instructions share: settings, and stages on task files (paper, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Callable

from torch import nn

from ...distill import Context, Template
from ...rounds import RoundSettings, rounds
from ...tokenizer import TextTokenizer
from ..item import one_item
from ..run import Experiment, Stage
from ..settings import DistillSettings, beside, option
from . import instruction_eval
from .inputs import NearCopies
from .instruction_eval import DATA, LONGEST, PLAIN, TEST, TaskEval, bare_prompt, end_with_line
from .natural_instructions import Instance, NITask, load_folder, official_tests

PAPER_SCALE = dict(scale="paper", practice_inputs=4096, epochs=1.0, lr=1e-5, batch_size=16,
                   warmup=0.0, decay=0.0, clip=0.0, max_new_tokens=128)
SMOLLM2 = dict(scale="smollm2", model="data/smollm2", data="data/natural_instructions/tasks", plain=True,
               practice_inputs=240, chunk=120, epochs=3.0, lr=1e-4, batch_size=16, max_new_tokens=64,
               save_every=300.0)


@dataclass
class TaskSettings(DistillSettings):
    """Settings of an experiment on Natural Instructions. The defaults are the pocket scale."""

    model: str = option("data/pocket-instructions", "folder or hub id of the instruction-tuned model")
    data: str = option(DATA, "folder of Natural-Instructions task files, the pocket's or the real ones")
    practice_inputs: int = option(1024, "for each context", least=1, unit="inputs")
    chunk: int = option(4096, "practised at a time: fewer need less memory, and are on disk sooner", least=1,
                        unit="inputs")
    epochs: float = option(3.0, "passes over the practice set", least=1e-3, most=1e6)
    lr: float = option(1e-3, "learning rate", above=0, most=10)
    batch_size: int = option(32, "batch size", least=1)
    warmup: float = option(0.05, "share of the steps with a growing learning rate", least=0, most=1)
    max_new_tokens: int = option(LONGEST, "longest answer", least=1, most=4096, unit="tokens")
    test_instances: int = option(TEST, "of each task", least=1, most=TEST, unit="instances")
    on_policy: bool = option(False, "the student writes the answers, the teacher labels them")
    plain: bool = option(False, PLAIN)

    def rounds(self) -> RoundSettings:
        practice = replace(self.practice_settings(self.max_new_tokens), chunk=self.chunk)
        return RoundSettings(practice, self.fit_settings(), self.practice_inputs, self.epochs, self.on_policy,
                             self.save_every)


class TaskExperiment(Experiment):
    """Contexts are made from the task files of a folder."""

    Eval, RECORDS = TaskEval, ("smollm2", "pocket", "paper")
    ask, examine = staticmethod(instruction_eval.ask), staticmethod(instruction_eval.examine)

    @cached_property
    def loaded(self) -> tuple[nn.Module, TextTokenizer]:
        model, tokenizer = super().loaded
        if self.settings.plain:
            end_with_line(model, tokenizer)
        return model, tokenizer

    @property
    def data(self) -> Path:
        return Path(beside(self.settings.data))

    @cached_property
    def all_tasks(self) -> list[NITask]:
        """Those of the folder; of the whole collection, the official test tasks."""
        return load_folder(self.data, official_tests(self.data))

    @property
    def tasks(self) -> list[NITask]:
        """Those of the experiment."""
        raise NotImplementedError

    def files(self) -> list[Path]:
        return [self.data / f"{task.name}.json" for task in self.tasks]

    @property
    def bare(self) -> Template:
        return bare_prompt(self.settings)

    def example(self, context: Callable[[], Context]) -> Stage:
        """One practice item, shown whole."""
        settings = self.settings.rounds().practice
        return Stage("example", lambda: one_item(context(), self.tokenizer, self.base, settings, self.seed),
                     show=str)

    def score(self, model: nn.Module, template: Template, instances: list[Instance],
              name: str = "") -> dict[str, float]:
        return instruction_eval.score(model, self.tokenizer, template, instances, self.settings, name)

    def accuracy(self, model: nn.Module, template: Template, task: NITask) -> float:
        return instruction_eval.accuracy(model, self.tokenizer, template, task, self.settings)

    def distill_rounds(self, name: str, schedule: list[list[Context]], seed: int,
                       recursive: bool = False) -> nn.Module:
        """The student after these rounds. A longer schedule of the same name goes on from a shorter one."""
        return rounds(self.base, self.tokenizer, schedule, self.settings.rounds(), recursive=recursive,
                      seed=seed, folder=self.folder.path / name, name=name)


def untested(task: NITask) -> list[str]:
    """The inputs after those that are tested, without near copies of these: a file may repeat itself."""
    tests = NearCopies(instance.input for instance in task.instances[:TEST])
    return [instance.input for instance in task.instances[TEST:] if instance.input not in tests]
