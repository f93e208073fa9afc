"""The pocket world: small tasks on short lists of words, in many wordings, to teach following instructions.

A task applies one or two rules of rules.py to a list. The functions of the evaluation tasks do not occur in
training: each has a rule with a category, or two rules in an order, that no training task has.
`to_natural_instructions` makes files of Natural Instructions' format. Nothing here adds numbers.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, zip_longest
from typing import Iterator, Sequence

from minicd.tasks.parts.natural_instructions import Example, inputs_prompt
from minicd.tasks.parts.natural_instructions import lay_out as instruction_prompt

from .rules import (BINARY, COMMON, DOUBLING, NEW, Items, Step, Steps, adds, functions, shows_new_words,
                    step_results, training_steps)
from .words import (CATEGORIES, DEFINITIONS, FAMILY_OF, HALF_FIRST, HALF_SECOND, KIND_OF, LAYOUTS,
                    LONG_LAYOUTS, MARKS, NONE, NOT_BUT, RIGHT_ONE, RIGHT_TWO, TWO_STEPS, VAGUE, WORDS, WRONG,
                    plural, world_words)

__all__ = ["Task", "TaskPool", "association_tasks", "draw_item", "evaluation_tasks", "inputs_prompt",
           "instruction_prompt", "to_natural_instructions", "training_tasks", "world_words"]

LONGEST, LONGEST_OUTPUT = 6, 8  # words of an input, of an output
SHORT = 3  # the most words of a result that an explanation repeats
SHORT_LAYOUTS = [name for name in LAYOUTS if name not in LONG_LAYOUTS]
EVALUATED = {"Classification": 7, "Counting": 5, "Word Selection": 5, "Word Categorization": 2,
             "Word Substitution": 5, "List Manipulation": 8}  # evaluation tasks of each family
# Rules that change little of the list, so that copying scores well, or that give long lists.
UNSUITED = {"change", "front", "end", "twice", "double", "swap_ends", "first_to_end"}
ASSOCIATION = [("has",), ("starts",), ("ends",), ("drop_last", "has")]
TRIES = 60  # inputs drawn in search of a suitable one


@dataclass(frozen=True)
class Task:
    """A function, how much of it the definition states, and the form of its inputs.

    style: `full` states the rule, `half` one of its two steps, `vague` nothing; explanations state all of it.
    words: which words the inputs hold, `common`, `new` (see `shows_new_words`) or `all`.
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
        """Input → output. Other words than the lists' are ignored: a task can answer every task's inputs."""
        return join_items(step_results(self.steps, items_of(text))[-1])

    def definition(self, rng: random.Random) -> str:
        if self.style == "vague":
            return rng.choice(VAGUE)
        if self.style == "half":
            return rng.choice([HALF_SECOND, HALF_FIRST][self.hidden]).format(**phrases(self.steps, rng))
        return rng.choice(DEFINITIONS).format(rule=rule_in_words(self.steps, rng))

    def draw_input(self, rng: random.Random, longest: int = LONGEST) -> str:
        """A random input. Labels are balanced, two steps both matter in half, and few outputs are empty."""
        labels = self.steps[-1].bindings.get("l")
        wanted = rng.choice(labels.split("/")) if labels else None
        matters, may_be_none = len(self.steps) == 2 and rng.random() < 0.5, rng.random() < 0.1
        for tried in range(100 * TRIES):
            items = self.draw_items(rng, longest)
            results = step_results(self.steps, items)
            output = join_items(results[-1])
            sums = map(adds, [items, items, *results], [results[-1], *results])
            if any(sums) or len(results[-1]) > LONGEST_OUTPUT:
                continue
            fits = wanted in (None, output) and (may_be_none or output != NONE)
            idle = matters and tried < TRIES and self.steps[-1](items) == results[-1]
            if (fits and not idle) or tried > 2 * TRIES:
                before, between, after = LAYOUTS[self.layout]
                return before + between.join(items) + after
        raise ValueError(f"task {self.name} has no inputs")

    def draw_items(self, rng: random.Random, longest: int) -> Items:
        """Distinct words. Those that the rules name are more frequent, so that the rules do something."""
        if any(step.rule in DOUBLING for step in self.steps):
            longest = min(longest, LONGEST_OUTPUT // 2)
        if self.layout in LONG_LAYOUTS:
            longest = min(longest, LONGEST - 1)
        longest = min(longest, sum(len(known_words(category, self.words)) for category in self.domain))
        length = 1 if longest == 1 or rng.random() < 0.05 else rng.randint(2, longest)
        named = [category for step in self.steps if step.rule not in BINARY for category in step.categories]
        items = [step.bindings["x"] for step in self.steps
                 if "x" in step.bindings and rng.random() < 0.6][:length]
        while len(items) < length:
            word = rng.choice(known_words(rng.choice([*self.domain, *named]), self.words))
            items += [word] * (word not in items)
        rng.shuffle(items)
        return items

    def explain(self, rng: random.Random, text: str) -> str:
        """Why the output is right: the rule in words, and the result of its first step."""
        templates = [RIGHT_ONE, RIGHT_TWO][len(self.steps) - 1]
        result = join_items(step_results(self.steps, items_of(text))[0])
        return choose_template(templates, result, rng).format(**phrases(self.steps, rng), result=result)

    def wrong_output(self, rng: random.Random, text: str) -> tuple[str, Task]:
        """A wrong output and the task that gives it: one step alone, other arguments, or another rule."""
        items, right = items_of(text), self.function(text)
        for steps in neighbours(self.steps, rng):
            output = Task(steps).function(text)
            words = output.split()
            if output not in (right, NONE) and not adds(items, words) and len(words) <= LONGEST_OUTPUT:
                return output, Task(steps)
        raise AssertionError("neighbours never end")

    def explain_wrong(self, rng: random.Random, text: str, wrong: Task) -> str:
        """Why the output of `wrong` is wrong: the rule in words."""
        result = self.function(text)
        alike = len(self.steps) == 1 and wrong.steps[0].rule == self.steps[0].rule
        template = choose_template(WRONG, result, rng) if not alike or rng.random() < 0.7 else NOT_BUT
        rule, other = rule_in_words(self.steps, rng), rule_in_words(wrong.steps, rng)
        return template.format(rule=rule, wrong=other, result=result)


def items_of(text: str) -> Items:
    return [word for word in text.split() if word in KIND_OF or word in MARKS]


def join_items(items: Items) -> str:
    return " ".join(items) or NONE


def known_words(category: str, words: str) -> list[str]:
    """The words of a category that inputs may hold. There are no new digits."""
    return (COMMON if words == "common" else NEW if words == "new" and category in NEW else WORDS)[category]


def phrases(steps: Steps, rng: random.Random) -> dict[str, str]:
    return dict(zip(("one", "two"), (step.phrase(rng) for step in steps)))


def rule_in_words(steps: Steps, rng: random.Random) -> str:
    """The whole rule in words."""
    parts = phrases(steps, rng)
    return rng.choice(TWO_STEPS).format(**parts) if len(steps) == 2 else parts["one"]


def choose_template(templates: Sequence[str], result: str, rng: random.Random) -> str:
    return rng.choice([t for t in templates if "{result}" not in t or len(result.split()) <= SHORT])


def neighbours(steps: Steps, rng: random.Random) -> Iterator[Steps]:
    """Other functions, without end, made of steps of training tasks or of these steps."""
    known, last = training_steps(), steps[-1]
    alike = [step for step in known[last.rule] if step.bindings.get("l") == last.bindings.get("l")]
    while True:
        if len(steps) == 2 and rng.random() < 0.5:
            yield (rng.choice(steps),)
        yield (rng.choice(alike if rng.random() < 0.6 else known[rng.choice(list(known))]),)


# --- The tasks ---


def with_style(steps: Steps, rng: random.Random) -> Task:
    """A task with these steps, and a random style, layout and domain."""
    style = rng.choices(["full", "half", "vague"], [6, 2, 2] if len(steps) == 2 else [7, 0, 3])[0]
    named = list(dict.fromkeys(category for step in steps for category in step.categories))
    others = [category for category in CATEGORIES if category not in named]
    layout = rng.choice(LONG_LAYOUTS if rng.random() < 0.25 else SHORT_LAYOUTS)
    domain = named + rng.sample(others, rng.randint(2, 3))  # with one other, keep would equal remove
    words = "all" if shows_new_words(steps) else "common"
    return Task(steps, style, rng.randrange(2), layout, tuple(domain), words)


@cache
def training_tasks() -> list[Task]:
    """One task for each training function."""
    training = functions()["training"]
    return [with_style(steps, random.Random(f"training/{i}")) for i, steps in enumerate(training)]


@cache
def evaluation_tasks() -> list[Task]:
    """Tasks with held-out functions: the four of `association_tasks`, then EVALUATED, rules taking turns.

    Single rules are full and vague in turn, every third on new words; two rules full, half, vague, half.
    """
    tasks = list(association_tasks())
    taken = [without_labels(task.steps) for task in tasks]
    styles = {1: cycle(["full", "vague"]), 2: cycle(["full", "half", "vague", "half"])}
    words = cycle(["common", "common", "new"])
    layouts = cycle(LAYOUTS)
    for family, number in EVALUATED.items():
        candidates = [steps for steps in candidates_of(family) if without_labels(steps) not in taken]
        for steps in interleave(candidates)[:number]:
            task = with_style(steps, random.Random(f"evaluation/{len(tasks)}"))
            tasks.append(replace(task, style=next(styles[len(steps)]), layout=next(layouts),
                                 words=next(words) if len(steps) == 1 else task.words))
    return tasks


@cache
def association_tasks() -> list[Task]:
    """Four binary evaluation tasks with one domain and different layouts; two have each pair of labels."""
    chosen = []
    for rules, labels in zip(ASSOCIATION, cycle(["yes/no", "true/false"])):
        candidates = interleave(candidates_of("Classification"))
        steps = next(steps for steps in candidates if tuple(step.rule for step in steps) == rules)
        chosen.append((*steps[:-1], Step(steps[-1].rule, (*steps[-1].arguments[:-1], labels))))
    named = [category for steps in chosen for step in steps for category in step.categories]
    domain = tuple(dict.fromkeys([*named, "animal", "fruit", "colour"]))[:5]
    layouts = ["commas", "brackets", "bars", "list"]
    return [Task(steps, layout=layout, domain=domain) for steps, layout in zip(chosen, layouts)]


@cache
def candidates_of(family: str) -> list[Steps]:
    """A family's held-out functions for evaluation: few outputs equal their inputs, and both steps matter."""
    return [steps for steps in functions()["evaluation"]
            if FAMILY_OF[steps[-1].rule] == family and not {step.rule for step in steps} & UNSUITED
            and (len(steps) == 1 or all(needs_more_than(steps, step) for step in steps))]


def needs_more_than(steps: Steps, step: Step) -> bool:
    """Whether the step alone gives other outputs for at least a sixth of the inputs."""
    rng = random.Random("differs")
    task, alone = with_style(steps, rng), Task((step,))
    inputs = [task.draw_input(rng) for _ in range(30)]
    return sum(task.function(text) != alone.function(text) for text in inputs) >= 5


def without_labels(steps: Steps) -> list[tuple]:
    return [(step.rule, step.categories) for step in steps]


def interleave(candidates: list[Steps]) -> list[Steps]:
    """The same functions, ordered so that the rules take turns."""
    by_rules: dict[tuple[str, ...], list[Steps]] = {}
    for steps in random.Random("in turn").sample(candidates, len(candidates)):
        by_rules.setdefault(tuple(step.rule for step in steps), []).append(steps)
    rounds = zip_longest(*(by_rules[rules] for rules in sorted(by_rules)))
    return [steps for one_each in rounds for steps in one_each if steps]


# --- Texts ---


class TaskPool:
    """Tasks to draw from: one rule or two with equal probability, and every choice of rules equally often.

    Binary tasks are three times as frequent: an answer of one token carries little signal, and they are
    learnt last.
    """

    def __init__(self, tasks: Sequence[Task]):
        by_rules: dict[tuple[str, ...], list[Task]] = {}
        for task in tasks:
            by_rules.setdefault(tuple(step.rule for step in task.steps), []).append(task)
        self.groups = [[tasks for rules, tasks in by_rules.items() if len(rules) == length]
                       for length in (1, 2)]

    def draw(self, rng: random.Random) -> Task:
        """A task with a new style, layout and domain."""
        groups = rng.choice([groups for groups in self.groups if groups])
        weights = [3 if group[0].steps[-1].rule in BINARY else 1 for group in groups]
        return with_style(rng.choice(rng.choices(groups, weights)[0]).steps, rng)


def draw_item(rng: random.Random, pool: TaskPool, longest: int = LONGEST, most_examples: int = 3,
              raw: float = 0.12) -> tuple[str, str]:
    """One (prompt, answer) of training: a task with 0 to 3 examples of each kind, or raw text."""
    task = pool.draw(rng)
    if rng.random() < raw:
        return raw_item(rng, task, longest)
    positives, negatives = rng.randint(0, most_examples), rng.randint(0, most_examples)
    if task.style != "full" and not positives:  # the rule would be unknowable
        task, positives = (task, 1) if most_examples else (replace(task, style="full"), 0)
    seen: set[str] = set()
    good = examples(task, rng, positives, seen, longest)
    bad = wrong_examples(task, rng, negatives, seen, longest)
    text = new_input(task, rng, seen, longest)
    return instruction_prompt(task.definition(rng), good, bad, rng.random() < 0.5, text), task.function(text)


def raw_item(rng: random.Random, task: Task, longest: int) -> tuple[str, str]:
    """Text without an instruction: after one list comes one of other words, after several a similar one."""
    task = replace(task, steps=(Step("copy"),), words="all")
    if rng.random() < 0.4:
        texts = [task.draw_input(rng, longest) for _ in range(rng.randint(2, 5))]
        return inputs_prompt(texts), task.draw_input(rng, longest)
    text = following = task.draw_input(rng, longest)
    while set(items_of(text)) & set(items_of(following)):
        following = task.draw_input(rng, longest)
    return text, following


def examples(task: Task, rng: random.Random, n: int, seen: set[str], longest: int = LONGEST) -> list[Example]:
    texts = [new_input(task, rng, seen, longest) for _ in range(n)]
    return [Example(text, task.function(text), task.explain(rng, text)) for text in texts]


def wrong_examples(task: Task, rng: random.Random, n: int, seen: set[str],
                   longest: int = LONGEST) -> list[Example]:
    result = []
    for text in [new_input(task, rng, seen, longest) for _ in range(n)]:
        output, wrong = task.wrong_output(rng, text)
        result.append(Example(text, output, task.explain_wrong(rng, text, wrong)))
    return result


def new_input(task: Task, rng: random.Random, seen: set[str], longest: int = LONGEST) -> str:
    """An input that is not yet in `seen`, or one that is after TRIES draws."""
    for _ in range(TRIES):
        text = task.draw_input(rng, longest)
        if text not in seen:
            break
    seen.add(text)
    return text


def to_natural_instructions(task: Task, instances: int, seed: int = 0) -> dict:
    """A task file of Natural Instructions v2. Raises ValueError where the task has too few inputs."""
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
