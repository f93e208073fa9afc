"""Instructions are internalised (hypothesis 1; paper, section 3.1).

T_t is a task's definition with 2 positive and 2 negative examples and their explanations; T_s is the bare
input, f the identity. D is the model itself, with a few-shot prompt for more inputs. Each task has its own
student. The score is Rouge-L over a task's first 100 instances, which Natural Instructions keeps for tests.

`--scale smollm2` takes a real language model to the real files. It is a plain one, which goes on after an
answer with the next example, so answers end with the line. Of its prompts (`--prompt`), the paper's was kept:
mean Rouge-L of 19 tasks, 24 instances each that are not tested, is 32.5 with it, 30.5 without explanations,
33.0 with the two positive examples alone; of 9 of them 40.0, 35.0, 37.4 and, with four positive ones, 39.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Iterator

import numpy as np
from torch import nn
from tqdm import tqdm

from ..distill import Context, combine_seeds, identity
from ..rounds import RoundSettings
from .parts import differs
from .parts.inputs import Inputs, NearCopies, few_shot_inputs, pool
from .parts.instruction_eval import SHAPES, TEST, instructed, with_explanations, without_explanations
from .parts.instruction_tasks import PAPER_SCALE, SMOLLM2, TaskExperiment, TaskSettings, untested
from .parts.natural_instructions import NITask
from .report import Record, against_paper, columns, pm, seeds_of, table
from .run import Stage
from .settings import option

ROWS = {"teacher": "teacher, instruction in the prompt", "before": "student before",
        "after": "**student after**", "after_pool": "**student after**, inputs from a pool",
        "token_ratio": "tokens at inference, teacher ÷ student"}
STUDENTS = {"after": "student", "after_pool": "student_pool"}  # row → stage
ROWS_OF = {"model": ["after"], "pool": ["after_pool"], "both": ["after", "after_pool"]}
MARGIN = 50  # untested instances on which the margins are measured; a task with fewer is left out


def chosen_tasks(tasks: list[NITask], margins: list[float], n: int) -> list[NITask]:
    """Half with the largest margins, half with margins nearest to 0 (paper, section 3.1)."""
    order = sorted(range(len(tasks)), key=lambda i: -margins[i])
    most, rest = order[: n // 2], order[n // 2 :]
    least = sorted(rest, key=lambda i: abs(margins[i]))[: n - n // 2]
    return [tasks[i] for i in [*most, *least]]


@dataclass
class InstructionSettings(TaskSettings):
    """One seed of the experiment."""

    practice_inputs: int = option(2048, "for each task", least=1, unit="inputs")
    tasks: int = option(10, "one half is helped most by explanations, the other least", least=1, unit="tasks")
    shots: int = option(4, "shown to the model that is asked for more", least=1, unit="example inputs")
    max_input_tokens: int = option(128, "longest that it may write; tasks of more words are left out",
                                   least=1, unit="tokens")
    input_temperature: float = option(1.0, "at which it writes them", above=0, most=10)
    inputs: str = option("model", "what the student practises on: inputs by the model itself, a pool of the "
                         "task's untested ones, or both, a student for each", choices=ROWS_OF)
    prompt: str = option("full", "the teacher's: all there is, or only so much of it", choices=SHAPES)


class Instructions(TaskExperiment):
    """Rouge-L on ten tasks."""

    TITLE = "Instructions are internalised (hypothesis 1)"
    DIFFERS = differs.INSTRUCTIONS
    Settings = InstructionSettings
    SCALES = {"pocket": {}, "paper": PAPER_SCALE,
              "smollm2": {**SMOLLM2, "inputs": "both", "shots": 6, "input_temperature": 0.8}}
    QUICK = dict(tasks=3, practice_inputs=512, test_instances=50)
    PAPER = {"teacher": 43.4, "before": 9.0, "after": 34.7, "token_ratio": 11.1}

    def stages(self) -> Iterator[Stage]:
        """The margins choose the tasks."""
        yield Stage("margins", self.margins)
        if self.folder.file("margins"):
            yield from self.task_stages()

    def task_stages(self) -> Iterator[Stage]:
        yield self.example(lambda: self.context(self.chosen[0]))
        for task in self.chosen:
            students = {row: f"{task.name}/{STUDENTS[row]}" for row in self.rows}
            for row, name in students.items():
                yield Stage(name, partial(self.student, task, row))
            yield Stage(f"score-{task.name}", partial(self.scores, task), tuple(students.values()),
                        lambda s, name=task.name: f"{name}: " + ", ".join(
                            f"{row} {s[row]:.1f}" for row in ("teacher", "before", *self.rows)))

    def distils(self) -> tuple[Context, RoundSettings]:
        return self.context(self.tasks[0], "after_pool"), self.settings.rounds()

    @property
    def rows(self) -> list[str]:
        """The students of a task, by their rows in the table."""
        return ROWS_OF[self.settings.inputs]

    @cached_property
    def tasks(self) -> list[NITask]:
        return [task for task in self.all_tasks if not self.why_left_out(task)]

    def why_left_out(self, task: NITask) -> str:
        """A clause, or nothing."""
        if len(task.instances) < TEST + MARGIN:
            return f"it has only {len(task.instances)} instances, of which {TEST} are for tests"
        words = np.median([len(instance.input.split()) for instance in task.instances])
        if words > self.settings.max_input_tokens:
            return f"its inputs have {words:.0f} words, which are longer than --max-input-tokens"
        return ""

    def prepare(self) -> None:
        for task in self.all_tasks:
            if why := self.why_left_out(task):
                tqdm.write(f"{task.name} is left out: {why}")
        wanted, there = self.settings.tasks, len(self.tasks)
        if there < wanted:
            raise ValueError(f"{wanted} tasks are asked for, but there are only {there}")

    @cached_property
    def chosen(self) -> list[NITask]:
        return chosen_tasks(self.tasks, self.folder.get("margins"), self.settings.tasks)

    def margins(self) -> list[float]:
        """By how much explanations raise the teacher's Rouge-L on each task, outside the test instances."""
        margins = []
        for task in self.tasks:
            instances = task.instances[TEST : TEST + MARGIN]
            full, less = (self.score(self.base, template(task), instances, f"margin of {task.name}")["rouge"]
                          for template in (with_explanations, without_explanations))
            margins.append(full - less)
        return margins

    def context(self, task: NITask, row: str = "") -> Context:
        inputs = self.pool(task) if (row or self.rows[0]) == "after_pool" else self.written(task)
        return Context(inputs, instructed(task, self.settings.prompt), self.bare, identity)

    def pool(self, task: NITask) -> Inputs:
        return pool(untested(task))

    def written(self, task: NITask) -> Inputs:
        """By the model itself. None is a test input."""
        s, given = self.settings, [example.input for example in [*task.positives, *task.negatives]]
        tests = [instance.input for instance in task.instances[:TEST]]
        forbidden = NearCopies([*tests, *given]) if s.plain else set(tests)
        return few_shot_inputs(self.base, self.tokenizer, given, s.shots, s.max_input_tokens, forbidden,
                               s.precision, s.input_temperature)

    def student(self, task: NITask, row: str) -> nn.Module:
        seed = combine_seeds((self.seed, self.tasks.index(task)))
        name = task.name if row == "after" else f"{task.name}/pool"
        return self.distill_rounds(name, [[self.context(task, row)]], seed)

    def scores(self, task: NITask) -> dict[str, float]:
        """Teacher, student before and after, and the ratio of tokens."""
        context, instances = self.context(task), task.instances[: self.settings.test_instances]
        models = {"teacher": (self.base, context.teacher), "before": (self.base, context.student)}
        found = {row: self.score(*how, instances, f"{row} on {task.name}") for row, how in models.items()}
        for row in self.rows:
            student = self.folder.get(f"{task.name}/{STUDENTS[row]}")
            found[row] = self.score(student, context.student, instances, f"{row} on {task.name}")
        for copy in (self.folder.path / task.name).rglob("round-*/student.safetensors"):
            copy.unlink()  # a student of a real model has half a gigabyte
        return {**{row: score["rouge"] for row, score in found.items()},
                "token_ratio": found["teacher"]["tokens"] / found[self.rows[0]]["tokens"]}

    def figures(self) -> dict[str, Any]:
        by_task = {task.name: self.folder.get(f"score-{task.name}") for task in self.chosen}
        metrics = {row: float(np.mean([task[row] for task in by_task.values()]))
                   for row in ROWS if row in by_task[self.chosen[0].name]}
        return {"metrics": metrics, "by_task": by_task}

    @classmethod
    def table(cls, record: Record) -> str:
        """Beside the paper's figures, then task by task."""
        columns = {"after_pool": "after, pool", "token_ratio": "tokens ÷"}
        names = [name for name in ROWS if name in record["metrics"]]
        rows = [[task, *(f"{row[name]:.1f}" for name in names)] for task, row in record["by_task"].items()]
        tasks = record["settings"].get("tasks", len(rows))
        each = f" a seed, {len(rows)} in all" if tasks < len(rows) else ""
        return "\n\n".join([f"Rouge-L, mean of {tasks} tasks{each}, {seeds_of(record)}",
                            against_paper(record, ROWS),
                            table(["task", *(columns.get(name, name) for name in names)], rows)])

    @classmethod
    def front(cls, records: list[Record]) -> str:
        """A table as soon as a real model has been there."""
        real = any(record["scale"] != "pocket" for record in records)
        return columns(records, ROWS, "Rouge-L") if real else ""

    @classmethod
    def headline(cls, record: Record) -> str:
        row = "after" if "after" in record["metrics"] else "after_pool"
        after, teacher, before = (pm(record["metrics"][name]) for name in (row, "teacher", "before"))
        return (f"Rouge-L {after} on the bare input, {teacher} with the instruction, {before} before "
                "(paper: 34.7, 43.4, 9.0)")
