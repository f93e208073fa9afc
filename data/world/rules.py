"""The rules of the pocket world: single steps on lists, and which of them are held out.

A rule turns a list of words into another; counts, labels and names of categories are lists of one word. No
rule adds numbers: the only arithmetic is the next digit, and `adds` finds outputs that are sums by chance.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Callable, Iterator

from .words import CATEGORIES, EQUAL, KIND_OF, LABELS, MARKS, OTHER, PHRASES, WORDS, plural, with_article

NEW = {category: words[-3:] for category, words in WORDS.items() if category != "digit"}
COMMON = {category: [word for word in words if word not in NEW.get(category, [])]
          for category, words in WORDS.items()}  # all but NEW, see `shows_new_words`
Items = list[str]


@dataclass(frozen=True)
class Rule:
    """`takes`: a step's arguments, c and d categories, w, x and y words, n a number, l a pair of labels."""

    takes: str
    apply: Callable[..., Items]


def kinds(items: Items) -> Items:
    return [KIND_OF.get(item, OTHER) for item in items]


def of_category(items: Items, category: str) -> Items:
    return [item for item in items if KIND_OF.get(item) == category]


def label(condition: object, labels: str) -> Items:
    yes, no = labels.split("/")
    return [yes if condition else no]


def swap_ends(items: Items) -> Items:
    return [items[-1], *items[1:-1], items[0]] if len(items) > 1 else items


def more(items: Items, c: str, d: str) -> Items:
    difference = len(of_category(items, c)) - len(of_category(items, d))
    return [EQUAL if difference == 0 else plural(c if difference > 0 else d)]


def extreme(choose: Callable) -> Callable[[Items], Items]:
    return lambda items: [choose(of_category(items, "digit"))] if of_category(items, "digit") else []


RULES = {
    "copy": Rule("", lambda items: items),
    "reverse": Rule("", lambda items: items[::-1]),
    "first": Rule("", lambda items: items[:1]),
    "second": Rule("", lambda items: items[1:2]),
    "last": Rule("", lambda items: items[-1:]),
    "drop_first": Rule("", lambda items: items[1:]),
    "drop_last": Rule("", lambda items: items[:-1]),
    "swap_ends": Rule("", swap_ends),
    "first_to_end": Rule("", lambda items: items[1:] + items[:1]),
    "twice": Rule("", lambda items: items + items),
    "double": Rule("", lambda items: [item for item in items for _ in range(2)]),
    "keep": Rule("c", of_category),
    "remove": Rule("c", lambda items, c: [item for item in items if KIND_OF.get(item) != c]),
    "replace": Rule("cw", lambda items, c, w: [w if KIND_OF.get(item) == c else item for item in items]),
    "change": Rule("xy", lambda items, x, y: [y if item == x else item for item in items]),
    "front": Rule("w", lambda items, w: [w, *items]),
    "end": Rule("w", lambda items, w: [*items, w]),
    "next_digits": Rule("", lambda items: [str((int(item) + 1) % 10) if item.isdigit() else item
                                           for item in items]),
    "kinds": Rule("", kinds),
    "first_of": Rule("c", lambda items, c: of_category(items, c)[:1]),
    "last_of": Rule("c", lambda items, c: of_category(items, c)[-1:]),
    "largest": Rule("", extreme(max)),
    "smallest": Rule("", extreme(min)),
    "first_kind": Rule("", lambda items: kinds(items[:1])),
    "last_kind": Rule("", lambda items: kinds(items[-1:])),
    "count": Rule("", lambda items: [str(len(items))]),
    "count_of": Rule("c", lambda items, c: [str(len(of_category(items, c)))]),
    "more": Rule("cd", more),
    "has": Rule("cl", lambda items, c, l: label(of_category(items, c), l)),
    "starts": Rule("cl", lambda items, c, l: label(of_category(items[:1], c), l)),
    "ends": Rule("cl", lambda items, c, l: label(of_category(items[-1:], c), l)),
    "ends_match": Rule("l", lambda items, l: label(kinds(items[:1]) == kinds(items[-1:]), l)),
    "all_same": Rule("l", lambda items, l: label(len(set(kinds(items))) <= 1, l)),
    "longer": Rule("nl", lambda items, n, l: label(len(items) > int(n), l)),
    "contains": Rule("xl", lambda items, x, l: label(x in items, l)),
}
NUMBER = {rule: number for number, rule in enumerate(RULES)}
OPENINGS = ["reverse", "drop_first", "drop_last", "swap_ends", "first_to_end", "keep", "remove", "replace",
            "change", "front", "end", "next_digits"]  # rules that may be the first of two
BINARY = [name for name, rule in RULES.items() if rule.takes.endswith("l")]
ABOUT_DIGITS = ["next_digits", "largest", "smallest"]
ABOUT_KINDS = ["kinds", "first_kind", "last_kind", "ends_match", "all_same"]
DOUBLING = ["twice", "double"]
PAIRS_EACH = 12  # choices of arguments for a pair of rules


@dataclass(frozen=True)
class Step:
    """A rule with its arguments."""

    rule: str
    arguments: tuple[str, ...] = ()

    def __call__(self, items: Items) -> Items:
        return RULES[self.rule].apply(items, *self.arguments)

    @property
    def name(self) -> str:
        return "_".join([self.rule, *(argument.split("/")[0] for argument in self.arguments)])

    @property
    def bindings(self) -> dict[str, str]:
        """Letter → argument."""
        return dict(zip(RULES[self.rule].takes, self.arguments))

    @property
    def categories(self) -> list[str]:
        """What an input should hold so that the step has something to do."""
        named = [KIND_OF.get(argument, argument) for letter, argument in self.bindings.items()
                 if letter in "cdx"]
        return named + ["digit"] * (self.rule in ABOUT_DIGITS)

    def phrase(self, rng: random.Random) -> str:
        """One of the rule's phrases, with the arguments filled in."""
        names = dict(self.bindings)
        if "c" in names:
            names |= {"c": plural(names["c"]), "s": names["c"], "a": with_article(names["c"])}
        if "d" in names:
            names["d"] = plural(names["d"])
        if "l" in names:
            names["yes"], names["no"] = names["l"].split("/")
        return rng.choice(PHRASES[self.rule]).format(**names)


Steps = tuple[Step, ...]


def steps_of(rule: str) -> Iterator[Step]:
    """All steps with a rule; where words or two categories are arguments, a fixed random choice of them."""
    rng = random.Random(rule)
    common = [word for words in COMMON.values() for word in words]
    labels = ["/".join(pair) for pair in LABELS]
    choices = {"": [()], "l": [(l,) for l in labels], "w": [(w,) for w in MARKS],
               "c": [(c,) for c in CATEGORIES], "cl": [(c, l) for c in CATEGORIES for l in labels],
               "cw": [(c, w) for c in CATEGORIES for w in MARKS[::2]],
               "nl": [(n, l) for n in "234" for l in labels],
               "cd": [tuple(rng.sample(CATEGORIES, 2)) for _ in range(70)],
               "xy": [(x, y) for x in rng.sample(common, 70)
                      for y in [rng.choice(rng.choice([MARKS, common]))] if x != y],
               "xl": [(x, l) for x in rng.sample(common, 70) for l in [rng.choice(labels)]]}
    return (Step(rule, arguments) for arguments in dict.fromkeys(choices[RULES[rule].takes]))


def step_results(steps: Steps, items: Items) -> list[Items]:
    """The list after each step."""
    results = [items]
    for step in steps:
        results.append(step(results[-1]))
    return results[1:]


def adds(items: Items, output: Items) -> bool:
    """Whether the output is the sum of the input's digits, or of two numbers that they spell."""
    digits = of_category(items, "digit")
    if len(digits) < 2 or not output or not all(word.isdigit() for word in output):
        return False
    answer = int("".join(output))
    sums = [sum(int("".join(part)) for part in (digits[:i], digits[i:])) for i in range(1, len(digits))]
    return answer in [*sums, sum(map(int, digits))]


# --- What is held out ---


def is_held_out(step: Step) -> bool:
    """Two or three categories of every rule that takes one occur in no training task with that rule."""
    return "c" in step.bindings and (CATEGORIES.index(step.bindings["c"]) + NUMBER[step.rule]) % 6 == 0


def is_held_out_pair(one: str, two: str) -> bool:
    """A fifth of the pairs of rules occur in no training task in this order, only with other partners."""
    return (3 * NUMBER[one] + NUMBER[two]) % 5 == 1


def split_of(steps: Steps) -> str:
    """training, evaluation, or neither for what is new in two ways."""
    if len(steps) == 1:
        return "evaluation" if is_held_out(steps[0]) else "training"
    if any(is_held_out(step) for step in steps):
        return "neither"
    return "evaluation" if is_held_out_pair(*(step.rule for step in steps)) else "training"


def shows_new_words(steps: Steps) -> bool:
    """Whether inputs may hold the last three words of each category.

    Training tasks show them only where no argument is a category or a word, as in copying and naming
    categories: that other rules apply to them too must be inferred.
    """
    return not any(set(step.bindings) & set("cdwxy") for step in steps)


def pairs_of(one: str, two: str) -> list[Steps]:
    """A fixed choice of arguments for two rules; a common category would make the second step trivial."""
    if one == "keep" and two in ABOUT_KINDS:
        return []
    rng = random.Random(f"{one} {two}")
    ones, twos = (rng.choices(list(steps_of(rule)), k=PAIRS_EACH) for rule in (one, two))
    return [(a, b) for a, b in dict.fromkeys(zip(ones, twos)) if not {*a.categories} & {*b.categories}]


def probes() -> list[Items]:
    """Lists to distinguish functions: short ones, like inputs, and long ones with the words of most rules."""
    rng = random.Random("probes")
    words = [word for words in WORDS.values() for word in words]
    return [rng.sample(words, rng.randint(1, 6) if i % 2 else 20) for i in range(60)]


@cache
def functions() -> dict[str, list[Steps]]:
    """The functions of each split, each once: equal ones stay in training rather than evaluation, and as a
    single rule rather than two. Constant functions are left out.
    """
    singles = [(step,) for rule in RULES for step in steps_of(rule)]
    pairs = [steps for one, two in product(OPENINGS, RULES) if two != "copy" for steps in pairs_of(one, two)]
    inputs, seen = probes(), set()
    kept: dict[str, list[Steps]] = {"training": [], "evaluation": []}
    for candidates, split in product((singles, pairs), kept):
        for steps in (steps for steps in candidates if split_of(steps) == split):
            behaviour = tuple(" ".join(step_results(steps, items)[-1]) for items in inputs)
            if behaviour not in seen and len({*behaviour} - {""}) > 1:
                seen.add(behaviour)
                kept[split].append(steps)
    return kept


@cache
def training_steps() -> dict[str, list[Step]]:
    """Rule → the steps with it that are training functions by themselves."""
    steps: dict[str, list[Step]] = {}
    for only in (s[0] for s in functions()["training"] if len(s) == 1):
        steps.setdefault(only.rule, []).append(only)
    return steps
