"""The pocket world: small tasks on short lists of words, told in many wordings, to learn from to follow instructions.

A task applies one or two rules of rules.py to a list. The functions of the evaluation tasks do not occur in training:
each has a rule with a category, or two rules in an order, that no training task has. Tasks can be written as files in the
format of Natural Instructions. Nothing here adds numbers.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, zip_longest
from typing import Iterator, Sequence

from minicd.tasks.natural_instructions import Example, inputs_prompt
from minicd.tasks.natural_instructions import lay_out as instruction_prompt

from .rules import (BINARY, COMMON, DOUBLING, NEW, Items, Step, Steps, adds, functions, shows_new_words, stages,
                          training_steps)
from .words import (CATEGORIES, DEFINITIONS, FAMILY_OF, HALF_FIRST, HALF_SECOND, KIND_OF, LAYOUTS, LONG_LAYOUTS, MARKS,
                          NONE, NOT_BUT, RIGHT_ONE, RIGHT_TWO, TWO_STEPS, VAGUE, WORDS, WRONG, plural, world_words)

__all__ = ["Task", "TaskPool", "association_tasks", "draw_item", "evaluation_tasks", "inputs_prompt", "instruction_prompt",
           "to_natural_instructions", "training_tasks", "world_words"]

LONGEST, LONGEST_OUTPUT = 6, 8  # words of an input, of an output
SHORT = 3  # explanations repeat results of up to so many words
SHORT_LAYOUTS = [name for name in LAYOUTS if name not in LONG_LAYOUTS]
EVALUATED = {"Classification": 7, "Counting": 5, "Word Selection": 5, "Word Categorization": 2, "Word Substitution": 5,
             "List Manipulation": 8}  # tasks of each family for evaluation
# Rules that leave most of the list as it is, where copying scores well, or give long lists.
UNSUITED = {"change", "front", "end", "twice", "double", "swap_ends", "first_to_end"}
ASSOCIATION = [("has",), ("starts",), ("ends",), ("drop_last", "has")]
TRIES = 60  # inputs drawn in search of one as wanted


@dataclass(frozen=True)
class Task:
    """A function with fixed arguments, how much of it the definition states, and what its inputs look like.

    style: `full` states the rule, `half` one of its two steps, `vague` nothing; explanations state all of it.
    words: which of the known words the inputs hold, `common`, `new` (see `shows_new_words`) or `all`.
    """

    steps: Steps
    style: str = "full"
    hidden: int = 1  # the step that a half definition leaves out
    layout: str = "plain"
    domain: tuple[str, ...] = tuple(CATEGORIES)
    words: str = "common"

    @property
    def name(self) -> str:
        return "_then_".join(step.name for step in self.steps)

    @property
    def family(self) -> str:
        return FAMILY_OF[self.steps[-1].rule]

    def function(self, text: str) -> str:
        """Input → output. Words that no list holds are overlooked, so a task can be asked about every other task's inputs."""
        return written(stages(self.steps, items_of(text))[-1])

    def definition(self, rng: random.Random) -> str:
        if self.style == "vague":
            return rng.choice(VAGUE)
        if self.style == "half":
            return rng.choice([HALF_SECOND, HALF_FIRST][self.hidden]).format(**phrases(self.steps, rng))
        return rng.choice(DEFINITIONS).format(rule=told(self.steps, rng))

    def draw_input(self, rng: random.Random, longest: int = LONGEST) -> str:
        """A random input. Labels are balanced, for half of the inputs the first of two steps matters, few leave nothing."""
        labels = self.steps[-1].given.get("l")
        wanted = rng.choice(labels.split("/")) if labels else None
        matters, may_be_none = len(self.steps) == 2 and rng.random() < 0.5, rng.random() < 0.1
        for tried in range(100 * TRIES):
            items = self.draw_items(rng, longest)
            results = stages(self.steps, items)
            output = written(results[-1])
            if any(map(adds, [items, items, *results], [results[-1], *results])) or len(results[-1]) > LONGEST_OUTPUT:
                continue
            fits = wanted in (None, output) and (may_be_none or output != NONE)
            idle = matters and tried < TRIES and self.steps[-1](items) == results[-1]
            if (fits and not idle) or tried > 2 * TRIES:
                before, between, behind = LAYOUTS[self.layout]
                return before + between.join(items) + behind
        raise ValueError(f"task {self.name} has no inputs")

    def draw_items(self, rng: random.Random, longest: int) -> Items:
        """Words, none of them twice. What the rules name is drawn more often than the rest, so that they find something to do."""
        if any(step.rule in DOUBLING for step in self.steps):
            longest = min(longest, LONGEST_OUTPUT // 2)
        if self.layout in LONG_LAYOUTS:
            longest = min(longest, LONGEST - 1)
        longest = min(longest, sum(len(shown(category, self.words)) for category in self.domain))
        length = 1 if longest == 1 or rng.random() < 0.05 else rng.randint(2, longest)
        named = [category for step in self.steps if step.rule not in BINARY for category in step.categories]
        items = [step.given["x"] for step in self.steps if "x" in step.given and rng.random() < 0.6][:length]
        while len(items) < length:
            word = rng.choice(shown(rng.choice([*self.domain, *named]), self.words))
            items += [word] * (word not in items)
        rng.shuffle(items)
        return items

    def explain(self, rng: random.Random, text: str) -> str:
        """Why the output is right: the rule in words, and what its first or only step gives."""
        templates = [RIGHT_ONE, RIGHT_TWO][len(self.steps) - 1]
        result = written(stages(self.steps, items_of(text))[0])
        return short_enough(templates, result, rng).format(**phrases(self.steps, rng), result=result)

    def wrong_output(self, rng: random.Random, text: str) -> tuple[str, Task]:
        """Another output and the task that gives it: one step alone, the same rule with other arguments, or another rule."""
        items, right = items_of(text), self.function(text)
        for steps in neighbours(self.steps, rng):
            output = Task(steps).function(text)
            if output not in (right, NONE) and not adds(items, output.split()) and len(output.split()) <= LONGEST_OUTPUT:
                return output, Task(steps)
        raise AssertionError("neighbours never end")

    def explain_wrong(self, rng: random.Random, text: str, wrong: Task) -> str:
        """Why the output of `wrong` is not right: the rule in words."""
        result = self.function(text)
        alike = len(self.steps) == 1 and wrong.steps[0].rule == self.steps[0].rule
        template = short_enough(WRONG, result, rng) if not alike or rng.random() < 0.7 else NOT_BUT
        return template.format(rule=told(self.steps, rng), wrong=told(wrong.steps, rng), result=result)


def items_of(text: str) -> Items:
    return [word for word in text.split() if word in KIND_OF or word in MARKS]


def written(items: Items) -> str:
    return " ".join(items) or NONE


def shown(category: str, words: str) -> list[str]:
    """The words of a category that inputs may hold. There are no new digits."""
    return (COMMON if words == "common" else NEW if words == "new" and category in NEW else WORDS)[category]


def phrases(steps: Steps, rng: random.Random) -> dict[str, str]:
    return dict(zip(("one", "two"), (step.phrase(rng) for step in steps)))


def told(steps: Steps, rng: random.Random) -> str:
    """The whole rule in words."""
    parts = phrases(steps, rng)
    return rng.choice(TWO_STEPS).format(**parts) if len(steps) == 2 else parts["one"]


def short_enough(templates: Sequence[str], result: str, rng: random.Random) -> str:
    return rng.choice([t for t in templates if "{result}" not in t or len(result.split()) <= SHORT])


def neighbours(steps: Steps, rng: random.Random) -> Iterator[Steps]:
    """Endlessly many other functions, all made of steps that training tasks or these steps have."""
    known, last = training_steps(), steps[-1]
    alike = [step for step in known[last.rule] if step.given.get("l") == last.given.get("l")]
    while True:
        if len(steps) == 2 and rng.random() < 0.5:
            yield (rng.choice(steps),)
        yield (rng.choice(alike if rng.random() < 0.6 else known[rng.choice(list(known))]),)


# --- The tasks ---


def dressed(steps: Steps, rng: random.Random) -> Task:
    """A task with these steps; style, layout and domain are drawn at random."""
    style = rng.choices(["full", "half", "vague"], [6, 2, 2] if len(steps) == 2 else [7, 0, 3])[0]
    named = list(dict.fromkeys(category for step in steps for category in step.categories))
    others = [category for category in CATEGORIES if category not in named]
    layout = rng.choice(LONG_LAYOUTS if rng.random() < 0.25 else SHORT_LAYOUTS)
    domain = named + rng.sample(others, rng.randint(2, 3))  # with only one other, to keep would be to remove that
    return Task(steps, style, rng.randrange(2), layout, tuple(domain), "all" if shows_new_words(steps) else "common")


@cache
def training_tasks() -> list[Task]:
    """One task for each training function."""
    return [dressed(steps, random.Random(f"training/{i}")) for i, steps in enumerate(functions()["training"])]


@cache
def evaluation_tasks() -> list[Task]:
    """Tasks whose functions are held out: the four of `association_tasks`, then so many of each family, rules in turn.

    Single rules are full and vague in turn, every third on new words; two rules are full, half, vague, half in turn.
    """
    tasks = list(association_tasks())
    taken = [apart_from_labels(task.steps) for task in tasks]
    styles = {1: cycle(["full", "vague"]), 2: cycle(["full", "half", "vague", "half"])}
    words = cycle(["common", "common", "new"])
    layouts = cycle(LAYOUTS)
    for family, number in EVALUATED.items():
        for steps in in_turn([steps for steps in suited(family) if apart_from_labels(steps) not in taken])[:number]:
            task = dressed(steps, random.Random(f"evaluation/{len(tasks)}"))
            shown_words = next(words) if len(steps) == 1 else task.words
            tasks.append(replace(task, style=next(styles[len(steps)]), layout=next(layouts), words=shown_words))
    return tasks


@cache
def association_tasks() -> list[Task]:
    """Four binary evaluation tasks that share a domain and differ in the look of their inputs; two have each pair of labels."""
    chosen = []
    for rules, labels in zip(ASSOCIATION, cycle(["yes/no", "true/false"])):
        steps = next(s for s in in_turn(suited("Classification")) if tuple(step.rule for step in s) == rules)
        chosen.append((*steps[:-1], Step(steps[-1].rule, (*steps[-1].arguments[:-1], labels))))
    named = [category for steps in chosen for step in steps for category in step.categories]
    domain = tuple(dict.fromkeys([*named, "animal", "fruit", "colour"]))[:5]
    return [Task(steps, layout=layout, domain=domain) for steps, layout in zip(chosen, ["commas", "brackets", "bars", "list"])]


@cache
def suited(family: str) -> list[Steps]:
    """Held-out functions of a family that are fit for evaluation: few inputs are their own outputs, and both steps matter."""
    return [steps for steps in functions()["evaluation"] if FAMILY_OF[steps[-1].rule] == family
            and not {step.rule for step in steps} & UNSUITED and all(differs(steps, step) for step in steps if len(steps) == 2)]


def differs(steps: Steps, step: Step) -> bool:
    """Whether one step alone gives something else for a sixth of the inputs or more."""
    rng = random.Random("differs")
    task, alone = dressed(steps, rng), Task((step,))
    inputs = [task.draw_input(rng) for _ in range(30)]
    return sum(task.function(text) != alone.function(text) for text in inputs) >= 5


def apart_from_labels(steps: Steps) -> list[tuple]:
    return [(step.rule, step.categories) for step in steps]


def in_turn(candidates: list[Steps]) -> list[Steps]:
    """The same functions in an order in which the rules take turns."""
    by_rules: dict[tuple[str, ...], list[Steps]] = {}
    for steps in random.Random("in turn").sample(candidates, len(candidates)):
        by_rules.setdefault(tuple(step.rule for step in steps), []).append(steps)
    rounds = zip_longest(*(by_rules[rules] for rules in sorted(by_rules)))
    return [steps for one_each in rounds for steps in one_each if steps]


# --- Texts ---


class TaskPool:
    """Tasks to draw from: as many with one rule as with two, and every choice of rules as often as any other.

    Those with two labels three times as often: one token of their answers says little, and they were learnt last.
    """

    def __init__(self, tasks: Sequence[Task]):
        by_rules: dict[tuple[str, ...], list[Task]] = {}
        for task in tasks:
            by_rules.setdefault(tuple(step.rule for step in task.steps), []).append(task)
        self.groups = [list(by_rules[rules] for rules in by_rules if len(rules) == length) for length in (1, 2)]

    def draw(self, rng: random.Random) -> Task:
        """A task in a new dress."""
        groups = rng.choice([groups for groups in self.groups if groups])
        weights = [3 if group[0].steps[-1].rule in BINARY else 1 for group in groups]
        return dressed(rng.choice(rng.choices(groups, weights)[0]).steps, rng)


def draw_item(rng: random.Random, pool: TaskPool, longest: int = LONGEST, most_examples: int = 3,
              raw: float = 0.12) -> tuple[str, str]:
    """One (prompt, answer) to train the base on: a task with 0 to 3 examples of each kind, explained or not, or raw text."""
    task = pool.draw(rng)
    if rng.random() < raw:
        return raw_item(rng, task, longest)
    positives, negatives = rng.randint(0, most_examples), rng.randint(0, most_examples)
    if task.style != "full" and not positives:  # nobody could know the rule
        task, positives = (task, 1) if most_examples else (replace(task, style="full"), 0)
    seen: set[str] = set()
    good, bad = examples(task, rng, positives, seen, longest), wrong_examples(task, rng, negatives, seen, longest)
    text = new_input(task, rng, seen, longest)
    return instruction_prompt(task.definition(rng), good, bad, rng.random() < 0.5, text), task.function(text)


def raw_item(rng: random.Random, task: Task, longest: int) -> tuple[str, str]:
    """Text without an instruction goes on as text does: after one list comes one of other words, after several one like them."""
    task = replace(task, steps=(Step("copy"),), words="all")
    if rng.random() < 0.4:
        return inputs_prompt([task.draw_input(rng, longest) for _ in range(rng.randint(2, 5))]), task.draw_input(rng, longest)
    text = following = task.draw_input(rng, longest)
    while set(items_of(text)) & set(items_of(following)):
        following = task.draw_input(rng, longest)
    return text, following


def examples(task: Task, rng: random.Random, n: int, seen: set[str], longest: int = LONGEST) -> list[Example]:
    texts = [new_input(task, rng, seen, longest) for _ in range(n)]
    return [Example(text, task.function(text), task.explain(rng, text)) for text in texts]


def wrong_examples(task: Task, rng: random.Random, n: int, seen: set[str], longest: int = LONGEST) -> list[Example]:
    result = []
    for text in [new_input(task, rng, seen, longest) for _ in range(n)]:
        output, wrong = task.wrong_output(rng, text)
        result.append(Example(text, output, task.explain_wrong(rng, text, wrong)))
    return result


def new_input(task: Task, rng: random.Random, seen: set[str], longest: int = LONGEST) -> str:
    """An input that is not yet among those seen; one that is where hardly any other is left."""
    for _ in range(TRIES):
        text = task.draw_input(rng, longest)
        if text not in seen:
            break
    seen.add(text)
    return text


def to_natural_instructions(task: Task, instances: int, seed: int = 0) -> dict:
    """The content of a task file of Natural Instructions v2. Raises ValueError where the task has fewer inputs."""
    rng, seen = random.Random(f"{task.name}/{seed}"), set()
    positives, negatives = examples(task, rng, 3, seen), wrong_examples(task, rng, 3, seen)
    texts = [new_input(task, rng, seen) for _ in range(instances)]
    if len(seen) < len(positives) + len(negatives) + instances:
        raise ValueError(f"task {task.name} does not have {instances} different inputs")
    return {
        "Contributors": ["minicd"], "Source": ["generated by rule"], "URL": ["data/make_instructions.py"],
        "Categories": [task.family], "Reasoning": [], "Definition": [task.definition(rng)],
        "Input_language": ["English"], "Output_language": ["English"], "Instruction_language": ["English"],
        "Domains": [plural(category) for category in task.domain],
        "Positive Examples": [vars(example) for example in positives],
        "Negative Examples": [vars(example) for example in negatives],
        "Instances": [{"id": f"{task.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}", "input": text,
                       "output": [task.function(text)]} for text in texts],
        "Instance License": ["MIT"]}
