"""The frame of all experiments: settings → run folders → stages, several at a time → record → table.

An experiment is one file with a subclass of `Experiment`. It names its settings, yields the stages of one
seed, says which figures they give, and shows a record as a table. The frame does the rest: it skips finished
stages, resumes interrupted ones, and lets seeds and independent stages share the cores.
"""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Callable, ClassVar, Iterable, Iterator

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..distill import Context, distill
from ..hf.checkpoint import load
from ..labels import Examples
from ..losses import source
from ..rounds import RoundSettings
from ..runtime import progress
from ..runtime.device import pick_precision
from ..runtime.estimate import Batch, Plan, what_it_needs
from ..runtime.files import at_home, atomic_json
from ..runtime.jobs import helpers
from ..runtime.lock import one_writer
from ..runtime.lora import copy_to_train
from ..runtime.memory import keep_memory, return_memory
from ..sampling import generate
from ..tokenizer import TextTokenizer
from ..training import FitSettings
from .folder import RunFolder, read_wall, wall_time
from .item import shortened
from .record import ROOT, commit, fingerprints, hashes, make_record, runs_to_join
from .report import minutes_line
from .settings import EvalSettings, RunSettings, beside, changes, differences, flag

TRIED = 64  # inputs whose prompts show how long prompts are


@dataclass(frozen=True)
class Stage:
    """A part of the work. Its result stays in the run folder under its name."""

    name: str
    make: Callable[[], Any]  # → a model, Examples, or what JSON can hold
    needs: tuple[str, ...] = ()  # stages that have to finish first
    show: Callable[[Any], str] | None = None  # the finished value → a line for the person who waits


class Experiment:
    """One seed of an experiment. What a subclass has to give stands first."""

    Settings: ClassVar[type] = RunSettings
    Eval: ClassVar[type] = EvalSettings  # what eval.py has to know
    SCALES: ClassVar[dict[str, dict]] = {"pocket": {}}  # presets by name; the first is the default
    QUICK: ClassVar[dict[str, Any]] = {}  # what --quick changes
    PAPER: ClassVar[dict[str, Any]] = {}  # the paper's figures, by the names of `metrics`
    TITLE: ClassVar[str] = ""
    RECORDS: ClassVar[tuple[str, ...]] = ("pocket", "paper")  # scales that results/ may have a record of
    DIFFERS: ClassVar[str] = ""  # Markdown: what differs from the paper

    def stages(self) -> Iterable[Stage]:
        """The stages, most urgent first. Called again after each: later ones may depend on earlier values."""
        raise NotImplementedError

    def figures(self) -> dict[str, Any] | None:
        """{"metrics": {name: number}, …} of this seed; None where the settings end the run too early."""
        raise NotImplementedError

    @classmethod
    def table(cls, record: dict[str, Any]) -> str:
        """The record as Markdown."""
        raise NotImplementedError

    @classmethod
    def headline(cls, record: dict[str, Any]) -> str:
        """The record in a line, for README."""
        return ""

    @classmethod
    def front(cls, records: list[dict[str, Any]]) -> str:
        """All its records as Markdown, for the region of README with the task's name; then no line."""
        return ""

    @classmethod
    def ask(cls, model: nn.Module, tokenizer: TextTokenizer, question: str, settings: Any) -> str:
        """`eval.py --ask`: the model's answer."""
        raise ValueError("--ask: there is nothing to ask in this task")

    @classmethod
    def examine(cls, model: nn.Module, tokenizer: TextTokenizer, settings: Any, folder: Path) -> str:
        """`eval.py`: how the model from this folder does."""
        raise ValueError("eval.py: there is nothing to measure in this task, which has no `examine`")

    @classmethod
    def record_scale(cls, settings: Any) -> str:
        """The second part of the record's name."""
        return settings.scale

    @classmethod
    def complete(cls, record: dict[str, Any]) -> dict[str, Any]:
        """The record with what is computed from all seeds together."""
        return record

    @classmethod
    def plot(cls, record: dict[str, Any], path: Path) -> bool:
        """Draw the record, if there is something to draw and matplotlib is installed. Whether it did."""
        return False

    # --- what the stages of a subclass use ---

    def __init__(self, settings: Any, seed: int, folder: RunFolder):
        self.settings, self.seed, self.folder, self.device = settings, seed, folder, folder.device

    @cached_property
    def loaded(self) -> tuple[nn.Module, TextTokenizer]:
        half = self.settings.precision == "bf16-weights"
        return load(beside(self.settings.model), self.device, torch.bfloat16 if half else None)

    @property
    def base(self) -> nn.Module:
        return self.loaded[0]

    @property
    def tokenizer(self) -> TextTokenizer:
        return self.loaded[1]

    def generate(self, model: nn.Module, texts: list[str], longest: int, **how: Any) -> list[list[int]]:
        """Completions of these prompts as token ids, in the precision of the settings."""
        prompts = self.tokenizer.encode_all(texts)
        return generate(model, prompts, longest, precision=self.settings.precision, **how)

    def fit_copy(self, start: nn.Module, examples: Examples, settings: FitSettings, epochs: float,
                 stage: str) -> nn.Module:
        """Train a copy of `start` on the examples, and note its losses."""
        model = copy_to_train(start, settings.lora_rank)
        history = distill(model, examples, settings, epochs=epochs, seed=self.seed, name=stage,
                          checkpoint=self.folder.checkpoint(stage), save_every=self.settings.save_every)
        self.folder.note(stage, losses=history)
        return model

    def prepare(self) -> None:
        """Called once before the first stage: the place to borrow finished stages, or to refuse settings."""

    def distils(self) -> tuple[Context, RoundSettings] | None:
        """A context like all of its own, whose inputs cost nothing, and how it is learnt.

        From these the frame says what the run will need. None: it does not say.
        """
        return None

    def longest_other(self) -> int:
        """Tokens of the longest examples that it trains on besides what `distils` tells."""
        return 0

    def files(self) -> list[Path]:
        """The data files that it read, for the record."""
        return []

    def practice_item(self) -> str:
        """One practice item for the record, where it has room for it."""
        if self.folder.file("practice_figures"):
            return self.folder.get("practice_figures")["shown"].split("practice set:")[0]
        return shortened(self.folder.get("example")) if self.folder.file("example") else ""

    def publish(self) -> None:
        """Called for a record's first seed where --publish is given, besides writing it into results/."""

    # --- the frame ---

    def make(self, stage: Stage) -> None:
        precision = pick_precision(self.device, self.settings.precision)
        with self.folder.timed(stage.name, precision=precision):
            for need in stage.needs:
                self.folder.check(need)
            with at_home(self.folder.path, f"{type(self).__name__}, seed {self.seed}"):
                made = stage.make()
            self.folder.keep(stage.name, made, self.tokenizer if isinstance(made, nn.Module) else None)
        return_memory()

    def tell(self, stage: Stage) -> None:
        if not self.folder.note_file(stage.name).exists():
            tqdm.write(f"{self.folder.note_file(stage.name)} is missing: the record lacks minutes and losses "
                       f"of {stage.name}, whose files cannot be checked")
        if stage.show:
            value = self.folder.get(stage.name)
            try:
                tqdm.write(progress.printable(stage.show(value)))
            except (AttributeError, LookupError, TypeError):  # its checksum was in a note that is gone
                raise ValueError(f"{self.folder.file(stage.name)} is damaged: it is not of the stage "
                                 f"{stage.name}; delete it to run this stage anew") from None

    def notes(self) -> dict[str, dict[str, Any]]:
        """The notes of its stages: the folder may have those of settings before, such as another curve's."""
        stages = {self.folder.note_file(stage.name).stem for stage in self.stages()}
        return {name: note for name, note in self.folder.notes().items()
                if name.split(".parts--")[0] in stages}

    def waiting(self) -> Iterator[Stage]:
        """Unfinished stages whose needs are finished."""
        for stage in self.stages():
            if not self.folder.file(stage.name) and all(self.folder.file(need) for need in stage.needs):
                yield stage


def make_all(experiments: list[Experiment], jobs: int) -> None:
    """Make the unfinished stages of all seeds, `jobs` at a time."""
    check_finished(experiments)
    for experiment in experiments:
        for stage in experiment.stages():
            if experiment.folder.file(stage.name):
                experiment.tell(stage)
    tell_needs(experiments, jobs)
    if jobs > 1:
        return_memory()  # of the base that it looked at: helpers load their own
        side_by_side(experiments, jobs)
        return
    while work := next(((e, s) for e in experiments for s in e.waiting()), None):
        experiment, stage = work
        experiment.make(stage)
        experiment.tell(stage)


def check_finished(experiments: list[Experiment]) -> None:
    """Raises ValueError where a finished stage is damaged, whether it is read again or not."""
    for experiment in experiments:
        for stage in experiment.stages():
            if experiment.folder.file(stage.name):
                experiment.folder.check(stage.name)


def tell_needs(experiments: list[Experiment], jobs: int) -> None:
    """Before the first stage: what the run will need in memory and on disk, beside what there is."""
    first = next((e for e in experiments for _ in e.waiting()), None)
    if first and (found := first.distils()):
        plan = planned(first, *found)
        flags = [flag(field) for field in fields(first.settings)]
        tqdm.write(what_it_needs(plan, first.folder.path, flags, jobs))
        if jobs > 1:
            vars(first).pop("loaded", None)


def planned(experiment: Experiment, context: Context, how: RoundSettings) -> Plan:
    """The widest batch is taken from some inputs; the answer may be as long as the teacher's completion."""
    inputs = context.inputs(TRIED, np.random.default_rng((experiment.seed, 6)))

    def longest(*templates: Callable[[str], str]) -> int:
        texts = [template(x) for template in templates for x in inputs]
        return max(map(len, experiment.tokenizer.encode_all(texts)))
    answer = how.practice.max_new_tokens
    student = max(longest(context.student), experiment.longest_other() - answer)
    batch = Batch(how.fit.batch_size, student, answer, longest(*context.teachers))
    return Plan(experiment.base, batch, how.fit, how.practice, how.items, experiment.device)


def side_by_side(experiments: list[Experiment], jobs: int) -> None:
    """Helpers make the stages and write them into the run folder. This process only says who makes what."""
    running: dict[Any, tuple[Experiment, Stage]] = {}
    with helpers(jobs) as submit:
        while True:
            for e, stage in [(e, s) for e in experiments for s in e.waiting()]:
                if len(running) < jobs and (e, stage.name) not in [(e, s.name) for e, s in running.values()]:
                    name = f"seed {e.seed} " if len(experiments) > 1 else ""
                    future = submit(make_in_helper, type(e), e.settings, e.seed, e.folder.path, e.device,
                                    stage.name, name)
                    running[future] = e, stage
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                experiment, stage = running.pop(future)
                future.result()
                experiment.tell(stage)


IN_HELPER: dict[Path, Experiment] = {}  # so that a helper loads the base once while it stays with a seed


def make_in_helper(kind: type[Experiment], settings: Any, seed: int, path: Path, device: torch.device,
                   stage: str, name: str) -> None:
    commit()  # as the code is now
    if path not in IN_HELPER:  # one base at a time
        IN_HELPER.clear()
        return_memory()
        IN_HELPER[path] = kind(settings, seed, RunFolder(path, device))
    experiment = IN_HELPER[path]
    progress.NAME = name
    experiment.make(next(s for s in experiment.stages() if s.name == stage))


def seed_folder(out: Path, seed: int) -> Path:
    """Seed 0 has the run folder itself, the other seeds have folders inside it."""
    return out if seed == 0 else out / f"seed-{seed}"


def train(task: str, kind: type[Experiment], settings: Any, seeds: list[int], out: Path, device: torch.device,
          *, jobs: int = 1, quick: bool = False, publish: bool = False, join: bool = False) -> None:
    """`train.py`: all stages of all seeds, then the record and its table."""
    commit(), keep_memory()
    experiments = [kind(settings, seed, RunFolder(seed_folder(out, seed), device)) for seed in seeds]
    changed = differences(settings, kind.SCALES[settings.scale], kind.QUICK if quick else {})
    print(f"{kind.TITLE}\n{settings.scale} scale{', quick' * quick}, seeds {' '.join(map(str, seeds))}, "
          f"in {out}, on {device}, {jobs} stage{'s' * (jobs > 1)} at a time\n"
          + (f"differs from the defaults: {' '.join(changed)}\n" if changed else ""))
    with one_writer(out, *(experiment.folder.path for experiment in experiments)):
        record = run(task, kind, experiments, out, jobs, join)
        if record is None:
            print(f"stopped after the stage {settings.until}, as asked")
            return
        publish_record(kind, record, out, publish)
        for experiment in experiments:
            if publish and experiment.seed == record["seeds"][0]:
                experiment.publish()
    print(f"\n{kind.table(record)}\n\n{minutes_line(record)}\nEverything is in {out}")


def run(task: str, kind: type[Experiment], experiments: list[Experiment], out: Path, jobs: int,
        join: bool = False) -> dict[str, Any] | None:
    """All stages of all seeds → the record; None where the settings end the run too early for one."""
    made_from, *_ = [claimed(experiment) for experiment in experiments]
    settings = experiments[0].settings
    scale = kind.record_scale(settings)
    published = ROOT / "results" / f"{task}-{scale}.json"
    find_earlier = partial(runs_to_join, published, made_from, partial(changes, settings))
    if join:
        find_earlier()  # refuses before hours of work
    with wall_time(out, [e.folder for e in experiments]):
        make_all(experiments, jobs)
    check_finished(experiments)  # also those which an unfinished one had hidden
    figures = [experiment.figures() for experiment in experiments]
    if None in figures:
        return None
    notes, seeds = [e.notes() for e in experiments], [e.seed for e in experiments]
    earlier = find_earlier() if join else []  # with seeds that were published meanwhile
    record = make_record(task, settings, seeds, figures, notes, kind.PAPER, earlier) | {"scale": scale}
    more = {**made_from, "item": experiments[0].practice_item()}
    record = kind.complete(record) | {key: value for key, value in more.items() if value}
    wall, covered = read_wall(out / "wall.json")
    spent = sum(note.get("minutes", 0.0) for stages in notes for note in stages.values())  # not rounded
    if set(record["seeds"]) == set(seeds) and covered > 0.9 * spent:
        record["minutes"]["wall"] = round(wall, 2)  # not of other machines, nor where a kill has lost some
    return record


def claimed(experiment: Experiment) -> dict[str, Any]:
    """What it is made from. Raises ValueError where its run folder is another run's."""
    experiment.folder.claim(experiment.settings, experiment.seed)
    experiment.prepare()
    files = hashes(experiment.files())
    base = fingerprints(Path(beside(getattr(experiment.settings, "model", ""))))
    experiment.folder.claim_data(files | base)
    loss = getattr(experiment.settings, "loss", None)
    return {"files": files, "base": base, "loss_source": source(loss) if loss else None}


def publish_record(kind: type[Experiment], record: dict[str, Any], out: Path, publish: bool) -> None:
    """Write record and plot into the run folder, and with `publish` into results/ too."""
    name = f"{record['task']}-{record['scale']}"
    for folder, file in [(out, "record.json")] + [(ROOT / "results", f"{name}.json")] * publish:
        atomic_json(folder / file, record)
        if kind.plot(record, folder / f"{name}.png"):
            print(f"The plot is in {folder / name}.png")
