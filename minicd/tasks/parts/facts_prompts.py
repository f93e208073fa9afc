"""The teacher's prompt on an edited fact, and what is practised under it (appendix A.2)."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from torch import nn

from ...distill import Context, Template, identity
from ...tokenizer import TextTokenizer
from .facts_data import Fact, Relation, fill, names
from .inputs import Inputs, NearCopies, written_inputs
from .instruction_eval import bare

NOTHING_ELSE = " Nothing else changes: all other facts stay as they are."
SHAPES = {  # of the teacher's prompt: nothing else changes, neighbours shown, the fact shown, both explained
    "statement": (False, False, False, False), "nothing_else": (True, False, False, False),
    "neighbours": (True, True, False, False), "demonstrated": (True, True, True, False),
    "explained": (True, True, True, True)}
BEFORE = ["I read this in a book. ", "Here is what the teacher said. ", "It rained all day. ",
          "Let us begin. ", "Question and answer. ", "The train was late. ",
          "Everybody at the table agreed. ", "Next sentence. "]
QUESTIONS = [("Water boils at a temperature of one hundred degrees.", "At what temperature does water boil?"),
             ("Snow is white.", "Which colour does snow have?"),
             ("The largest animal of all is the blue whale.", "Which animal is the largest of all?"),
             ("Bees make honey.", "What do bees make?")]


class Wording:
    """One fact in the words of its teacher's prompt and of practice. No test has any of these sentences."""

    def __init__(self, fact: Fact, relations: dict[str, Relation]):
        """`relations`: what may be said of other subjects; without the fact's own, its statement alone."""
        self.fact, self.relations = fact, relations
        self.relation = relations.get(fact.relation, Relation((), {}))

    # --- T_t ---

    def teacher(self, shape: str) -> Template:
        """T_t: the new fact, as much more as the shape has, and x."""
        nothing_else, neighbours, own, explained = SHAPES[shape]
        lines = [f"New fact: {self.fact.statement}" + NOTHING_ELSE * nothing_else]
        about = f" This is about {self.fact.subject}, so the new fact holds." * explained
        other = f" This is not about {self.fact.subject}, so nothing changes." * explained
        lines += [f"{self.own[-1]} {self.fact.new}.{about}"] * own
        lines += [f"{sentence}{other}" for sentence in self.unchanged[:2]] * neighbours
        head = "\n".join(lines)
        return lambda x: f"{head}\n\n{x}"

    @cached_property
    def unchanged(self) -> list[str]:
        """True sentences on other subjects of the relation: first one with the object that is edited away."""
        subjects = sorted(self.relation.subjects.items(), key=lambda pair: pair[1] != self.fact.true)
        subjects = [(s, o) for s, o in subjects if o != self.fact.new and not names(self.fact.prompt, s)]
        prompts = self.relation.prompts * len(subjects)
        return [f"{fill(prompt, s)} {o}." for prompt, (s, o) in zip(prompts, subjects)]

    # --- D ---

    @cached_property
    def own(self) -> list[str]:
        """Prompts on the edited subject."""
        return [self.fact.prompt, *(fill(prompt, self.fact.subject) for prompt in self.relation.prompts)]

    @cached_property
    def near(self) -> list[tuple[str, str]]:
        """Prompts on other subjects of the relation, and their objects."""
        return [(fill(prompt, s), o) for prompt in (self.fact.template, *self.relation.prompts)
                for s, o in self.relation.subjects.items() if not names(self.fact.prompt, s)]

    @cached_property
    def far(self) -> list[tuple[str, str]]:
        """Prompts of other relations, and their objects."""
        others = [relation for name, relation in self.relations.items() if name != self.fact.relation]
        return [(fill(prompt, s), o) for relation in others
                for prompt in relation.prompts for s, o in relation.subjects.items()]

    def others(self, rng: np.random.Generator) -> tuple[str, str]:
        """A prompt on another subject and its object: as often near as far."""
        pool = self.near if self.near and rng.random() < 0.5 else self.far
        return pool[rng.integers(len(pool))]

    def templates(self) -> Inputs:
        """D: one half on the edited subject, one half on others. Before one half stands another sentence."""
        def draw_one(rng: np.random.Generator) -> str:
            prompt = rng.choice(self.own) if rng.random() < 0.5 else self.others(rng)[0]
            return str(rng.choice(BEFORE) if rng.random() < 0.5 else "") + str(prompt)
        return lambda n, rng: [draw_one(rng) for _ in range(n)]

    def self_study(self, model: nn.Module, tokenizer: TextTokenizer, max_new_tokens: int,
                   precision: str | None) -> Inputs:
        """D: questions that the model writes with a fact in its prompt, in one half the new one.

        Drawing raises ValueError as `written_inputs` does.
        """
        def prompt(rng: np.random.Generator) -> str:
            fact = self.fact.statement if rng.random() < 0.5 else "{} {}.".format(*self.others(rng))
            shown = [QUESTIONS[i] for i in rng.permutation(len(QUESTIONS))]
            return "\n\n".join([*(f"Fact: {f}\nQuestion: {q}" for f, q in shown), f"Fact: {fact}\nQuestion:"])
        draw = written_inputs(model, tokenizer, prompt, max_new_tokens, NearCopies(self.fact.tests),
                              precision, stop=("\n",))
        return lambda n, rng: [f"Question: {question}\nAnswer:" for question in draw(n, rng)]

    def context(self, inputs: Inputs, shape: str) -> Context:
        """T_s is x itself, f the identity."""
        return Context(inputs, self.teacher(shape), bare, identity)
