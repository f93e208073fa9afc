"""Facts to edit, in CounterFact's file format, and how practice speaks of a relation's other subjects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.files import read_json
from .inputs import words
from .natural_instructions import check, listed, text

DATA, OTHERS, RELATIONS = (f"data/facts/{name}.json" for name in ("facts", "others", "relations"))


@dataclass(frozen=True)
class Fact:
    """An edit: the subject's object becomes `new` instead of `true`. All prompts end before the object."""

    relation: str
    template: str  # of the statement, with {} for the subject
    subject: str
    true: str
    new: str
    paraphrases: tuple[str, ...]
    neighbours: tuple[str, ...]  # prompts on other subjects with the object `true`, which must keep it

    @property
    def name(self) -> str:
        return f"{self.relation}, {self.subject}"

    @property
    def prompt(self) -> str:
        return fill(self.template, self.subject)

    @property
    def statement(self) -> str:
        return f"{self.prompt} {self.new}."

    @property
    def tests(self) -> tuple[str, ...]:
        return self.paraphrases + self.neighbours


def fill(template: str, subject: str) -> str:
    """The subject in the place of {}. A sentence gets a capital if its first word, no name, lacks one."""
    filled = template.replace("{}", subject)
    return filled[:1].upper() + filled[1:] if subject.islower() or subject.startswith("the ") else filled


def load_facts(path: Path) -> list[Fact]:
    """Read CounterFact's counterfact.json or a file like it: a list of records.

    Those without a paraphrase or a neighbour cannot be measured and are left out.
    Raises ValueError with the names of file, record and key where it is unusable.
    """
    records = read_json(path, "is no file of facts")
    try:
        check(isinstance(records, list) and bool(records), "a file of facts is a list of records")
        facts = [read_fact(item, f"record {i}: ") for i, item in enumerate(records)]
        found = [fact for fact in facts if fact.paraphrases and fact.neighbours]
        check(bool(found), "no record has both paraphrase_prompts and neighborhood_prompts")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found


def read_fact(item: Any, where: str) -> Fact:
    check(isinstance(item, dict), f"{where}it is no object")
    check("requested_rewrite" in item, f"{where}requested_rewrite is missing")
    rewrite, place = item["requested_rewrite"], f"{where}requested_rewrite"
    template, relation, subject = (text(rewrite, key, place) for key in ("prompt", "relation_id", "subject"))
    true, new = (text(rewrite.get(key), "str", f"{place}.{key}").strip()
                 for key in ("target_true", "target_new"))
    check(template.count("{}") == 1, f"{place}.prompt has no {{}} for the subject, or several")
    check(true != new, f"{place}: target_new and target_true are the same")
    prompts = [read_prompts(item, key, where) for key in ("paraphrase_prompts", "neighborhood_prompts")]
    return Fact(relation, template.strip(), subject.strip(), true, new, *prompts)


def read_prompts(item: dict, key: str, where: str) -> tuple[str, ...]:
    found = [prompt.strip() if isinstance(prompt, str) else "" for prompt in listed(item, key, 0, where)]
    check(all(found), f"{where}{key} holds something that is no text, or empty")
    return tuple(found)


def one_of_each_relation(facts: list[Fact], most: int) -> list[Fact]:
    """At random one fact of every relation (appendix A.2), always the same, and of these the first `most`."""
    rng, by_relation = np.random.default_rng(0), {}
    for fact in facts:
        by_relation.setdefault(fact.relation, []).append(fact)
    return [some[rng.integers(len(some))] for some in by_relation.values()][:most]


# --- what practice says ---


@dataclass(frozen=True)
class Relation:
    """Wordings that no test has, with {} for the subject, and subjects that no test has, with objects."""

    prompts: tuple[str, ...]
    subjects: dict[str, str]


def load_relations(path: Path, tested: list[Fact]) -> dict[str, Relation]:
    """Relation id → what practice may say, without subjects that a prompt on any of the tested facts names.

    Raises ValueError where the file is unusable.
    """
    data = read_json(path, "is no file of relations")
    try:
        check(isinstance(data, dict), "a file of relations is an object: relation id → prompts, subjects")
        return {name: read_relation(item, name, tested) for name, item in data.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_relation(item: Any, name: str, tested: list[Fact]) -> Relation:
    check(isinstance(item, dict), f"{name} is no object")
    prompts, subjects = read_prompts(item, "prompts", f"{name}."), item.get("subjects")
    check(all(prompt.count("{}") == 1 for prompt in prompts), f"{name}.prompts: each needs one {{}}")
    check(isinstance(subjects, dict) and all(isinstance(o, str) and o for o in subjects.values()),
          f"{name}.subjects is no object: subject → its object")
    said = {words(test) for fact in tested for test in fact.tests}
    prompts = tuple(p for p in prompts if not any(words(fill(p, f.subject)) in said for f in tested))
    named = [prompt for fact in tested for prompt in (fact.prompt, *fact.tests)]
    return Relation(prompts, {s: o for s, o in subjects.items() if not any(names(p, s) for p in named)})


def names(prompt: str, subject: str) -> bool:
    """Whether the subject's words stand in the prompt."""
    one, other = (f" {' '.join(words(sentence))} " for sentence in (subject, prompt))
    return one in other
