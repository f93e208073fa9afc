"""Addition in the form for pretrained decoders: one line a column, digits without spaces."""

import dataclasses
import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minicd.runtime.files import write_checked
from minicd.tasks import addition
from minicd.tasks.parts import addition_eval, addition_questions as text
from minicd.tasks.parts.addition_eval import AdditionEval
from minicd.tasks.settings import as_in_run
from minicd.tokenizer import TextTokenizer

LINES = text.FORMS["lines"]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    """A token for each byte, as digits have one each in SmolLM2's; its blank before # is part of the mark."""
    vocabulary = {piece: i for i, piece in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ#"])}
    backend = Tokenizer(models.BPE(vocabulary, [("Ġ", "#")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return TextTokenizer(backend, "<end>", None, ends_prompts=False)


def questions(n: int = 200) -> list[str]:
    drawn = text.draw_questions(n, 8, "practice", np.random.default_rng(0), unique=False)
    return ["0 + 0", "5 + 5", "9 9 9 9 9 9 9 9 + 9 9 9 9 9 9 9 9", *drawn]


def test_as_documented():
    assert LINES.scratchpad("1 2 + 3 9") == "2+9+0=11\n1+3+1=05\n#51#"
    assert LINES.scratchpad("5 + 5") == "5+5+0=10\n#10#"
    assert LINES.teacher("1 2 + 3 9") == "Add step by step: 12+39\n"
    assert LINES.student("1 2 + 3 9") == "Add: 12+39=" and LINES.answer("1 2 + 3 9") == "51"


def test_every_line_is_true_and_the_last_carry_leads():
    for question in questions():
        *lines, end = LINES.scratchpad(question).split("\n")
        a, b = text.joined(question).split("+")
        read = [tuple(map(int, re.fullmatch(r"(\d)\+(\d)\+(\d)=(\d)(\d)", line).groups())) for line in lines]
        assert [row[:2] for row in read] == list(zip(map(int, reversed(a)), map(int, reversed(b))))
        assert all(sum(row[:3]) == 10 * row[3] + row[4] for row in read)
        assert [row[2] for row in read] == [0, *(row[3] for row in read[:-1])]
        written = "".join(str(row[4]) for row in reversed(read))
        assert int(f"{read[-1][3]}{written}") == int(end.strip("#")) == int(a) + int(b)


def test_the_extractor_keeps_the_digits_alone(tokenizer):
    extract = text.final_answer(tokenizer)
    for question in questions():
        tokens = tokenizer.encode(LINES.scratchpad(question))
        assert tokenizer.decode(tokens[extract(tokens)]) == LINES.answer(question)
        assert extract(tokens[:-1]) is None
    spaced = tokenizer.encode("# 46 #")
    assert tokenizer.decode(spaced[extract(spaced)]).strip() == "46"


def test_no_scratchpad_is_longer_than_its_bound(tokenizer):
    bound = text.longest_scratchpad(tokenizer, "lines", 8)
    assert bound == max(len(tokenizer.encode(LINES.scratchpad(question))) for question in questions())


def test_examples_and_context_are_written_in_this_form(tokenizer):
    some = questions(5)
    scratchpads, direct = (make(some, tokenizer, "lines") for make in (addition.scratchpad_examples, addition.direct_examples))
    for i, question in enumerate(some):
        assert tokenizer.decode(scratchpads.prompts[i]) == LINES.teacher(question)
        assert tokenizer.decode(scratchpads.answers[i]) == LINES.scratchpad(question)
        assert tokenizer.decode(direct.prompts[i]) == LINES.student(question)
        assert tokenizer.decode(direct.answers[i]) == LINES.answer(question) and direct.answers[i][-1] == tokenizer.eos_id
    context = text.addition_context(tokenizer, 3, "lines")
    assert context.student("1 2 + 3 9") == "Add: 12+39="


def test_evaluation_asks_in_this_form(tokenizer, monkeypatch):
    asked = []

    def generate(model, prompts, *args, **how):
        asked.extend(map(tokenizer.decode, prompts))
        return [tokenizer.encode("46"), tokenizer.encode("11")]
    monkeypatch.setattr(addition_eval, "generate", generate)
    score = addition_eval.evaluate(None, tokenizer, ["1 2 + 3 4", "5 + 5"], False, 9, form="lines")
    assert asked == ["Add: 12+34=", "Add: 5+5="] and score["accuracy"] == 50.0


def test_eval_takes_form_and_digits_from_the_run(tmp_path, tokenizer, monkeypatch):
    settings = as_in_run(AdditionEval(), tmp_path)
    assert settings == AdditionEval()  # there is no run
    write_checked(tmp_path / "settings.json", {"scratchpad": "lines", "max_digits": 3, "model": "x"})
    settings = as_in_run(AdditionEval(), tmp_path)
    assert settings == AdditionEval(scratchpad="lines", max_digits=3)
    assert as_in_run(AdditionEval(max_digits=5), tmp_path).max_digits == 5
    monkeypatch.setattr(addition_eval, "generate", lambda model, prompts, *args, **how: prompts)
    assert addition_eval.ask(None, tokenizer, "12 + 34", settings) == "Add:12+34="
    assert addition_eval.ask(None, tokenizer, "12 + 34", dataclasses.replace(settings, step_by_step=True)) == "Add step by step: 12+34\n"


def test_settings_of_a_run_that_cannot_be(tmp_path):
    write_checked(tmp_path / "settings.json", {"scratchpad": "verses"})
    with pytest.raises(ValueError, match="--scratchpad verses: choose from compact, nye, lines"):
        as_in_run(AdditionEval(), tmp_path)
    write_checked(tmp_path / "settings.json", {"max_digits": "three"})
    with pytest.raises(ValueError, match="settings.json is damaged: what stands under 'max_digits' is of a wrong type; say "):
        as_in_run(AdditionEval(), tmp_path)
