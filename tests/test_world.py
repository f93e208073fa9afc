"""The pocket world: its rules, the split of its functions, its texts, its files. No text holds an addition."""

import random
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from data import make_instructions
from data.world import tasks as world
from data.world.tasks import TaskPool, association_tasks, draw_item, evaluation_tasks, inputs_prompt, items_of, training_tasks
from data.world.rules import BINARY, NEW, RULES, Step, is_held_out, is_held_out_pair, step_results
from data.world.words import CATEGORIES, KIND_OF, LAYOUTS, MARKS, PHRASES, WORDS, world_words
from minicd.metrics.rouge import rouge_l
from minicd.tokenizer import word_tokenizer

ROOT = Path(__file__).resolve().parent.parent

ITEMS = 1500

BY_HAND = [
    ("copy", (), "cat 3", "cat 3"), ("reverse", (), "cat pear 3", "3 pear cat"), ("first", (), "cat pear", "cat"),
    ("second", (), "cat pear oak", "pear"), ("second", (), "cat", "none"), ("last", (), "cat pear", "pear"),
    ("drop_first", (), "cat pear oak", "pear oak"), ("drop_first", (), "cat", "none"),
    ("drop_last", (), "cat pear oak", "cat pear"),
    ("swap_ends", (), "cat pear oak", "oak pear cat"), ("swap_ends", (), "cat", "cat"), ("swap_ends", (), "cat oak", "oak cat"),
    ("first_to_end", (), "cat pear oak", "pear oak cat"), ("twice", (), "cat oak", "cat oak cat oak"),
    ("double", (), "cat oak", "cat cat oak oak"), ("keep", ("fruit",), "cat pear plum", "pear plum"),
    ("keep", ("digit",), "cat 3 pear 1", "3 1"), ("remove", ("fruit",), "cat pear oak", "cat oak"),
    ("remove", ("fruit",), "pear", "none"), ("replace", ("fruit", "star"), "cat pear plum", "cat star star"),
    ("change", ("cat", "dog"), "cat pear", "dog pear"), ("front", ("sun",), "cat", "sun cat"),
    ("end", ("sun",), "cat", "cat sun"), ("next_digits", (), "cat 3 9 0", "cat 4 0 1"),
    ("kinds", (), "cat pear 3 star", "animal fruit digit other"),
    ("first_of", ("fruit",), "cat pear plum", "pear"), ("first_of", ("fruit",), "cat", "none"),
    ("last_of", ("fruit",), "pear plum cat", "plum"), ("largest", (), "3 cat 7 1", "7"), ("smallest", (), "3 cat 7 1", "1"),
    ("smallest", (), "cat", "none"), ("first_kind", (), "cat pear", "animal"), ("last_kind", (), "cat pear", "fruit"),
    ("count", (), "cat pear 3", "3"), ("count_of", ("fruit",), "cat pear plum", "2"), ("count_of", ("tool",), "cat", "0"),
    ("more", ("fruit", "animal"), "cat pear plum", "fruits"), ("more", ("fruit", "animal"), "cat cow plum", "animals"),
    ("more", ("fruit", "animal"), "cat plum oak", "equal"), ("has", ("fruit", "yes/no"), "cat plum", "yes"),
    ("has", ("fruit", "true/false"), "cat", "false"), ("starts", ("fruit", "good/bad"), "plum cat", "good"),
    ("starts", ("fruit", "good/bad"), "cat plum", "bad"), ("ends", ("fruit", "yes/no"), "cat plum", "yes"),
    ("ends", ("fruit", "yes/no"), "plum cat", "no"), ("ends_match", ("yes/no",), "cat plum dog", "yes"),
    ("ends_match", ("yes/no",), "cat plum", "no"), ("all_same", ("yes/no",), "cat dog", "yes"),
    ("all_same", ("yes/no",), "cat plum dog", "no"), ("longer", ("2", "yes/no"), "cat dog 3", "yes"),
    ("longer", ("2", "yes/no"), "cat dog", "no"), ("contains", ("cat", "yes/no"), "dog cat", "yes"),
    ("contains", ("cat", "yes/no"), "dog", "no")]


@pytest.mark.parametrize("rule, arguments, before, after", BY_HAND)
def test_rules_by_hand(rule, arguments, before, after):
    task = world.Task((Step(rule, arguments),))
    for start, between, end in LAYOUTS.values():
        assert task.function(start + between.join(before.split()) + end) == after


def test_every_rule_has_a_case_by_hand_and_four_phrases_of_its_own():
    assert {case[0] for case in BY_HAND} == set(RULES) == set(PHRASES) == set(world.FAMILY_OF)
    phrases = [phrase for phrases in PHRASES.values() for phrase in phrases]
    assert all(len(phrases) >= 4 for phrases in PHRASES.values()) and len(set(phrases)) == len(phrases)


def test_two_rules_follow_each_other():
    task = world.Task((Step("keep", ("fruit",)), Step("reverse")))
    assert task.function("( pear cat plum )") == "plum pear" and task.name == "keep_fruit_then_reverse"


# --- The split ---


def test_how_many_tasks_there_are():
    training, evaluation = training_tasks(), evaluation_tasks()
    assert len(training) >= 1000 and 30 <= len(evaluation) <= 40
    assert {step.rule for task in training for step in task.steps} == set(RULES)
    assert sum(task.style == "full" for task in evaluation) >= 10 and sum(task.style != "full" for task in evaluation) >= 10
    assert sum(task.steps[-1].rule in BINARY for task in evaluation) >= 6
    for tasks in (training, evaluation):
        assert len({task.name for task in tasks}) == len(tasks)


def test_held_out_by_construction():
    for task in training_tasks():
        assert not any(is_held_out(step) for step in task.steps)
        assert len(task.steps) == 1 or not is_held_out_pair(*(step.rule for step in task.steps))
    for task in evaluation_tasks():
        new_steps = [is_held_out(step) for step in task.steps]
        assert new_steps == [True] or (not any(new_steps) and is_held_out_pair(*(step.rule for step in task.steps)))


def test_both_halves_of_what_is_held_out_are_trained():
    """Every category with other rules, every rule with other categories, and both rules of a pair in the same place."""
    training = [task.steps for task in training_tasks()]
    arguments = {(step.rule, step.bindings.get("c")) for steps in training for step in steps}
    places = {(len(steps), i, step.rule) for steps in training for i, step in enumerate(steps)}
    for task in evaluation_tasks():
        for i, step in enumerate(task.steps):
            assert (len(task.steps), i, step.rule) in places
            if "c" in step.bindings:
                assert sum(category == step.bindings["c"] for _, category in arguments) >= 5
                assert sum(rule == step.rule for rule, _ in arguments) >= 5


def test_held_out_by_behaviour():
    """Every training function differs from every evaluation task on some of 200 of its own inputs."""
    training = [task.steps for task in training_tasks()]
    for task in evaluation_tasks():
        rng = random.Random(task.name)
        inputs = [items_of(task.draw_input(rng)) for _ in range(200)]
        outputs = [step_results(task.steps, items)[-1] for items in inputs]
        for steps in training:
            assert any(step_results(steps, items)[-1] != output for items, output in zip(inputs, outputs)), (task.name, steps)


def test_new_words_are_copied_and_named_in_training_but_tested_by_no_rule():
    new = {word for words in NEW.values() for word in words}
    shown = set()
    for task in training_tasks():
        rng = random.Random(task.name)
        found = new & {word for _ in range(5) for word in items_of(task.draw_input(rng))}
        assert not found or not any(set(step.bindings) & set("cdwxy") for step in task.steps)
        assert not new & {argument for step in task.steps for argument in step.arguments}
        shown |= found
    assert shown == new and all(len(words) == 3 for words in NEW.values())
    listed = [task for task in evaluation_tasks() if task.words == "new"]
    assert len(listed) >= 3 and all("c" in task.steps[0].bindings for task in listed)
    for task in listed:
        words = {word for _ in range(20) for word in items_of(task.draw_input(random.Random(1)))}
        assert {word for word in words if KIND_OF[word] != "digit"} <= new


def test_association_tasks():
    tasks = association_tasks()
    assert tasks == evaluation_tasks()[:4] and len({task.layout for task in tasks}) == 4
    assert Counter(task.steps[-1].bindings["l"] for task in tasks) == {"yes/no": 2, "true/false": 2}
    for task in tasks:
        rng = random.Random(task.name)
        texts = [task.draw_input(rng) for _ in range(300)]
        for other in tasks:
            answers = Counter(other.function(text) for text in texts)
            assert set(answers) == set(other.steps[-1].bindings["l"].split("/")), "both labels occur on every task's inputs"
            assert other != task or min(answers.values()) > 120


# --- Texts ---


@cache
def items() -> list[tuple[str, str]]:
    rng, pool = random.Random("test"), TaskPool(training_tasks())
    return [draw_item(rng, pool) for _ in range(ITEMS)]


def numbers(text: str) -> list[str]:
    return [word for word in text.split() if word.isdigit()]


def sums(text: str, output: str) -> bool:
    """Whether the output is what one gets by adding the input's digits, or the numbers that they write side by side."""
    digits, answer = numbers(text), numbers(output)
    if len(digits) < 2 or not answer or len(answer) != len(output.split()):
        return False
    parts = [(int("".join(digits[:i])), int("".join(digits[i:]))) for i in range(1, len(digits))]
    return int("".join(answer)) in {sum(map(int, digits)), *map(sum, parts)}


@pytest.mark.parametrize("text, output, found", [
    ("1 2", "3", True), ("cat 1 , 2 , 3", "6", True), ("1 2 3 4", "4 6", True), ("( 0 5 )", "5", True), ("9 9 1", "1 0 0", True),
    ("1 2", "2", False), ("1 cat", "1", False), ("1 2", "cat 3", False), ("1 2", "none", False)])
def test_the_scan_finds_a_sum(text, output, found):
    assert sums(text, output) is found


def test_no_item_adds():
    looked_at = 0
    for prompt, answer in items():
        shown = re.findall(r"Input: (.*)\nOutput: (.*)", prompt)
        question = prompt.rsplit("Input: ", 1)[-1].removesuffix("\nOutput:")
        for text, output in [*shown, *([(question, answer)] if prompt.startswith("Definition") else [])]:
            assert not sums(text, output), (prompt, answer)
            looked_at += len(numbers(text)) > 1 and all(word.isdigit() for word in output.split())
        assert not {"+", "add", "added", "plus", "sum", "total"} & set((prompt + " " + answer).lower().split())
    assert looked_at > 0.1 * ITEMS


def test_every_text_can_be_written():
    tokenizer = word_tokenizer(world_words())
    unknown = tokenizer.backend.token_to_id("<unk>")
    assert len(set(world_words())) == len(world_words()) < 450
    texts = [text for item in items() for text in item]
    for text, tokens in zip(texts, tokenizer.encode_all(texts)):
        assert unknown not in tokens, text
        assert tokenizer.decode(tokens).split() == text.split()
    unused = set(world_words()) - {word for text in texts for word in text.split()}
    assert len(unused) <= 5, unused


def test_words_of_lists_are_told_apart():
    listed = [word for words in WORDS.values() for word in words] + MARKS
    assert len(set(listed)) == len(listed) and not set(listed) & {*CATEGORIES, "none", "equal", "other"}
    assert not set(listed) & {word for text in world.DEFINITIONS + world.VAGUE + world.WRONG for word in text.split()}
    assert not set(listed) & {word for phrases in PHRASES.values() for phrase in phrases for word in phrase.split()}


def test_kinds_of_items():
    kinds = Counter("raw" if not p.startswith("Definition") else "task" for p, _ in items())
    assert 0.08 < kinds["raw"] / ITEMS < 0.16
    tasks = [prompt for prompt, _ in items() if prompt.startswith("Definition")]
    for kind in ("Positive", "Negative"):
        number = Counter(prompt.count(f"{kind} Example") for prompt in tasks)
        assert set(number) == {0, 1, 2, 3} and min(number.values()) > 0.12 * len(tasks)
    explained = sum("Explanation:" in prompt for prompt in tasks) / sum("Example" in prompt for prompt in tasks)
    assert 0.4 < explained < 0.6
    assert len({prompt.split("\n")[0] for prompt in tasks}) > 0.5 * len(tasks)
    assert max(len(answer.split()) for prompt, answer in items() if prompt.startswith("Definition")) <= 8


def test_raw_text_goes_on_with_other_words():
    raw = [(prompt, answer) for prompt, answer in items() if not prompt.startswith("Definition")]
    bare = [(prompt, answer) for prompt, answer in raw if not prompt.startswith("Input:")]
    assert len(bare) > 0.4 * len(raw)
    for prompt, answer in bare:
        assert items_of(answer) and not set(items_of(prompt)) & set(items_of(answer))
    for prompt, answer in raw:
        assert prompt.startswith("Input:") == prompt.endswith("\nInput:")
    assert inputs_prompt(["a", "b"]) == "Input: a\nInput: b\nInput:"


def test_settings_of_items():
    rng, pool = random.Random(0), TaskPool(training_tasks())
    for prompt, answer in (draw_item(rng, pool, longest=2, most_examples=0, raw=0) for _ in range(200)):
        assert prompt.startswith("Definition") and "Example" not in prompt
        assert len(items_of(prompt.split("Input: ")[1])) <= 2
    assert all(not draw_item(rng, pool, raw=1)[0].startswith("Definition") for _ in range(50))
    once, again = ([draw_item(random.Random(i), pool) for i in range(50)] for _ in range(2))
    assert once == again


# --- Examples and definitions ---


def wordings(step: Step) -> set[str]:
    rng = random.Random(0)
    return {step.phrase(rng) for _ in range(60)}


def says(text: str, step: Step) -> bool:
    return any(phrase in text for phrase in wordings(step))


@pytest.mark.parametrize("task", evaluation_tasks(), ids=lambda task: task.name)
def test_examples_say_what_is_done(task):
    rng, seen = random.Random(task.name), set()
    for example in world.examples(task, rng, 15, seen):
        assert example.output == task.function(example.input) and len(example.output.split()) <= 8
        assert all(says(example.explanation, step) for step in task.steps)
    for example in world.wrong_examples(task, rng, 15, seen):
        assert example.output != task.function(example.input)
        assert all(says(example.explanation, step) for step in task.steps)
    assert len(seen) == 30  # no input twice


@pytest.mark.parametrize("task", evaluation_tasks()[::3], ids=lambda task: task.name)
def test_definitions_say_as_much_as_their_style(task):
    pairs = {"full": [True, True], "vague": [False, False], "half": [task.hidden == 1, task.hidden == 0]}
    for style in ("full", "vague", *["half"] * (len(task.steps) == 2)):
        styled = replace(task, style=style)
        texts = {styled.definition(random.Random(i)) for i in range(60)}
        assert len(texts) >= {"full": 10, "half": 4, "vague": 4}[style]
        for text in texts:
            assert [says(text, step) for step in task.steps] == pairs[style][: len(task.steps)], text


def test_wrong_outputs_come_from_training_tasks_and_single_steps():
    trained = {task.steps for task in training_tasks()}
    for task in training_tasks()[::50] + evaluation_tasks():
        rng = random.Random(task.name)
        for _ in range(10):
            text = task.draw_input(rng)
            output, wrong = task.wrong_output(rng, text)
            assert output == wrong.function(text) != task.function(text)
            assert wrong.steps in trained or wrong.steps[0] in task.steps


def test_prompts_are_short_and_copying_does_not_pay():
    lengths, bare, copied, going_on = [], [], [], []
    for task in evaluation_tasks():
        rng = random.Random(task.name)
        for _ in range(10):
            good, bad = world.examples(task, rng, 2, set()), world.wrong_examples(task, rng, 2, set())
            text, definition = task.draw_input(rng), task.definition(rng)
            lengths.append(len(world.instruction_prompt(definition, good, bad, True, text).split()))
            bare.append(len(world.instruction_prompt(definition, [], [], True, text).split()))
            copied.append(rouge_l(text, [task.function(text)]))
            going_on.append(rouge_l(world.raw_item(rng, task, 6)[1], [task.function(text)]))
    assert sum(lengths) / len(lengths) < 150 and sorted(lengths)[int(0.9 * len(lengths))] <= 170 and max(lengths) <= 200
    assert sum(bare) / len(bare) < 30
    assert sum(copied) / len(copied) < 0.25 and sum(going_on) / len(going_on) < 0.05


# --- Files ---


def test_the_files_are_what_the_script_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: None)  # nothing is lost here, and disks may be slow
    make_instructions.main(tmp_path)
    committed = ROOT / "data" / "instructions"
    made, kept = ({path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.json"))}
                  for folder in (tmp_path, committed))
    assert list(made) == list(kept) and made == kept
    assert sum(map(len, made.values())) < 2.5e6


def test_writing_removes_files_of_other_tasks(tmp_path):
    (tmp_path / "task1_gone.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("stays")
    make_instructions.write(tmp_path, training_tasks()[:2], 1, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.txt", *(f"task00{i}_{task.name}.json" for i, task in enumerate(training_tasks()[:2], 1))]


def test_the_content_of_a_file_depends_on_the_seed_alone():
    task = evaluation_tasks()[0]
    first, again, other = (world.to_natural_instructions(task, 10, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert all(item["output"] == [task.function(item["input"])] for item in first["Instances"])
    assert first["Categories"] == ["Classification"]
    few = replace(task, steps=(Step("reverse"),), domain=("fruit",), words="new")  # of three words
    with pytest.raises(ValueError, match="does not have 50 different inputs"):
        world.to_natural_instructions(few, 50)
