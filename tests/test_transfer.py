"""Transfer of distilled addition: word problems, McNemar's test, instruction items, the measures, and the command end to end."""

import importlib
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minicd.decoder import Decoder, initialise
from minicd.hf.checkpoint import save
from minicd.hf.families import read_config
from minicd.labels import Examples, Ragged, SoftLabels
from minicd.metrics import mcnemar
from minicd.tasks import transfer
from minicd.tasks.addition import AdditionSettings
from minicd.tasks.folder import RunFolder
from minicd.tasks.parts import transfer_eval, word_problems
from minicd.tasks.parts.addition_questions import split_of, test_questions as unseen_questions
from minicd.tasks.parts.instruction_items import draw_items, load_split, with_true_answers
from minicd.tasks.parts.natural_instructions import Example, Instance, NITask
from minicd.tasks.parts.transfer_eval import EXAMPLES, FORM, student_prompt, teacher_prompt
from minicd.tasks.parts.word_problems import (TEMPLATES, Resembling, asked_sums, draw_sums, problems, result, runs_of_words)
from minicd.tasks.settings import guarded
from minicd.tasks.transfer import Transfer, TransferSettings, end_of_line, ending_lines
from minicd.tokenizer import TextTokenizer, word_tokenizer

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "natural_instructions" / "tasks"
RAW = {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": False, "hidden_size": 16, "intermediate_size": 24,
       "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
       "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "eos_token_id": 0}
SMALL = ["--device", "cpu", "--jobs", 1, "--precision", "fp32", "--max-digits", 2, "--train-questions", 6, "--teacher-items", 4,
         "--teacher-epochs", 1, "--teacher-lr", 1e-6, "--teacher-batch", 4, "--floor", 0, "--practice-questions", 20,
         "--label-samples", 5, "--student-items", 4, "--start", "teacher", "--item-answers", "true",
         "--lora-rank", 0, "--student-batch", 4, "--item-tokens", 400,
         "--max-new-tokens", 5, "--test-questions", 5, "--test-instances", 2]


def byte_tokenizer() -> TextTokenizer:
    """A token for each byte."""
    vocabulary = {piece: i for i, piece in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return TextTokenizer(backend, "<end>", None, ends_prompts=False)


def marking_decoder(tokenizer: TextTokenizer) -> Decoder:
    """Random, but for a constant feature: it mostly writes 7 and #, so that many completions hold an answer like #77#."""
    model = initialise(Decoder(read_config({**RAW, "vocab_size": len(tokenizer)})), seed=0).eval()
    with torch.no_grad():
        model.tokens.weight[:, 0], model.lm_head.weight[:, 0] = 30.0, 0.0
        for text, odds in (("7", 20.0), ("#", 10.0)):
            model.lm_head.weight[tokenizer.encode(text)[0], 0] = math.log(odds * len(tokenizer)) / 16**0.5
        model.lm_head.weight[0, 0] = math.log(3.0 * len(tokenizer)) / 16**0.5
    return model


def task(name: str, categories: list[str], instances: list[tuple[str, str]]) -> NITask:
    shown = [Example(f"is {c} a word", "no", "it is so") for c in "abc"]
    asked = [Instance(f"{name}-{i}", text, [output, "another"]) for i, (text, output) in enumerate(instances)]
    return NITask(name, "say yes or no.", shown, [], asked, categories)


def write_task(place: Path, name: str, categories=("Kind",)) -> None:
    place.mkdir(parents=True, exist_ok=True)
    made = task(name, list(categories), [(f"is {name} {i} a word", "yes" if i % 2 else "no") for i in range(9)])
    examples = [vars(example) for example in made.positives]
    (place / f"{name}.json").write_text(json.dumps({
        "Definition": [made.definition], "Categories": made.categories, "Positive Examples": examples, "Negative Examples": [],
        "Instances": [{"id": i.id, "input": i.input, "output": i.outputs} for i in made.instances]}))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("marking"), byte_tokenizer()
    save(marking_decoder(tokenizer), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("items")
    for split, names in {"train": ("task1_a", "task2_b"), "test": ("task3_c", "task4_d")}.items():
        for name in names:
            write_task(folder / split, name)
    return folder


# --- word problems ---


def test_every_problem_is_one_sum_of_its_two_numbers():
    for split, some in problems().items():
        assert len(some) == word_problems.COUNTS[split]
        for problem in some:
            assert list(map(int, re.findall(r"\d+", problem.text))) in ([problem.a, problem.b], [problem.b, problem.a])
            assert problem.answer == str(problem.a + problem.b) and 1 <= len(problem.answer) <= 3
            assert problem.text.endswith("?") and "{" not in problem.text and min(problem.a, problem.b) >= 2
            assert len(str(problem.a)) == len(str(problem.b))
    lengths = Counter(len(problem.answer) for problem in problems()["test"])
    assert min(lengths.values()) >= 8 and set(lengths) == {1, 2, 3}


def test_templates_take_turns_and_no_sum_comes_twice():
    assert len(TEMPLATES["test"]) >= 12 and not set(TEMPLATES["test"]) & set(TEMPLATES["validation"])
    for split, some in problems().items():
        for i, problem in enumerate(some):
            template = TEMPLATES[split][i % len(TEMPLATES[split])]
            assert re.fullmatch(re.sub(r"\\{\w+\\}", ".+", re.escape(template)), problem.text)
    assert len({problem.text for problem in problems()["test"]}) == 200
    sums = [(problem.a, problem.b) for some in problems().values() for problem in some]
    assert len(set(sums)) == len(sums) == 300


def test_problems_depend_on_the_seed_alone():
    again = problems.__wrapped__(2022)
    assert again == problems() and problems.__wrapped__(7) != again
    assert draw_sums(50, 3) == draw_sums(60, 3)[:50]


def test_two_people_in_a_problem_are_two():
    for some in problems().values():
        for problem in some:
            people = re.findall("|".join(word_problems.PEOPLE), problem.text)
            assert len(set(people)) <= 2 and not re.search(r"\b(\w+) and \1\b", problem.text)


@pytest.mark.parametrize("text, number", [(" 12 lemons", "12"), ("It is 007.", "7"), ("none", ""), ("5 + 7 = 12 cups of 3", "12"),
                                          ("5+7=7+5=12", "12"), ("5 + 7 =", ""), ("0", "0")])
def test_the_first_number_counts_or_that_after_the_sum(text, number):
    assert result(text) == number


def test_nothing_that_is_practised_resembles_a_problem():
    """Three words in a row are enough here; in instruction items it takes five."""
    asked = [prompt(q) + end(q) for q in unseen_questions(50, 8) for prompt, end in
             ((teacher_prompt, FORM.scratchpad), (student_prompt, FORM.answer))]
    close = Resembling(n=3)
    assert not any(text in close for text in asked)
    texts = [template.format(p="Ada", q="Bob", a=1, b=2, things="cups", place="here") for some in TEMPLATES.values() for template in some]
    words = set().union(*(runs_of_words(text, 3) for text in texts))
    assert not any(words & runs_of_words(text, 3) for text in asked)


def test_what_resembles_a_problem_is_known():
    known = Resembling()
    text = problems()["test"][1].text
    assert text in known and re.sub(r"\d+", "4711", text).upper() in known and f"Solve this. {text} Why?" in known
    assert "How many cups does it take?" not in known and "" not in known
    assert runs_of_words("A 12 b 3", 3) == {("a", "0", "b"), ("0", "b", "0")}


# --- McNemar's test ---


def test_mcnemar_by_hand():
    # 5 better, 1 worse, 4 equal: 2 · (C(6, 0) + C(6, 1)) / 2⁶ = 14 / 64
    before = [0, 0, 0, 0, 0, 1, 1, 1, 0, 0]
    after = [1, 1, 1, 1, 1, 0, 1, 1, 0, 0]
    assert mcnemar(before, after) == mcnemar(after, before) == 14 / 64
    assert mcnemar([0] * 10, [1] * 10) == 2 / 1024
    assert mcnemar([0, 1], [1, 0]) == 1.0 and mcnemar([1, 1], [1, 1]) == 1.0 and mcnemar([], []) == 1.0
    assert mcnemar([0.0, 0.33, 1.0], [0.33, 0.67, 1.0]) == 0.5  # means of seeds: the sign test
    with pytest.raises(ValueError, match="compares the same items: here are 2 and 3"):
        mcnemar([0, 1], [0, 1, 1])


# --- what is practised, what is tested ---


def experiment(tmp_path: Path, seed: int = 0, **settings) -> Transfer:
    made = Transfer(TransferSettings(**settings), seed, RunFolder(tmp_path, torch.device("cpu")))
    made.loaded = None, byte_tokenizer()
    return made


def test_questions_are_disjoint(tmp_path):
    """The teacher's 499, practice, tests, the prompts' examples, and the sums inside word problems."""
    made = experiment(tmp_path, max_digits=8)
    scratchpads = made.scratchpads()
    labelled = {made.tokenizer.decode(scratchpads.prompts[i]) for i in range(len(scratchpads))}
    practised = set(made.context.inputs(5000, np.random.default_rng(0)))
    tests = set(unseen_questions(1000, 8))
    assert len(labelled) == 499 and len(tests) == 1000 and any(len(q) == 5 for q in practised)
    for questions in (practised, tests, asked_sums(), set(EXAMPLES)):
        assert not labelled & {teacher_prompt(q) for q in questions}
    assert not practised & tests and not practised & asked_sums() and not practised & set(EXAMPLES)
    assert not set(EXAMPLES) & (tests | asked_sums()) and all(split_of(q) == "validation" for q in EXAMPLES)
    validated = set(made.questions(2000, "validation", np.random.default_rng(0)))
    assert not validated & (practised | tests | asked_sums() | set(EXAMPLES))


def test_the_teachers_questions_are_unique_and_those_of_the_seed(tmp_path):
    one, two = (experiment(tmp_path, seed).scratchpads() for seed in (0, 1))
    assert len({tuple(one.prompts[i]) for i in range(len(one))}) == 499 and one.prompts[0] != two.prompts[0]
    assert experiment(tmp_path).scratchpads().prompts[7] == one.prompts[7]


def test_both_prompts_have_the_same_description_and_examples():
    assert student_prompt("1 2 + 3 9") == "Add two numbers.\nAdd: 43+86=129\nAdd: 313+205=518\nAdd: 12+39="
    assert teacher_prompt("1 2 + 3 9") == (
        "Add two numbers.\nAdd step by step: 43+86\n3+6+0=09\n4+8+0=12\n#129#\n"
        "Add step by step: 313+205\n3+5+0=08\n1+0+0=01\n3+2+0=05\n#518#\nAdd step by step: 12+39\n")


def test_items_have_their_own_answers_and_some_are_left_out():
    tokenizer, rng = byte_tokenizer(), np.random.default_rng
    good = task("task1", ["Kind"], [(f"is w{i} a word", f"yes {i}") for i in range(20)])
    bad = task("task2", ["Kind"], [("two lines", "one\ntwo"), ("long " * 200, "yes"), (problems()["test"][0].text, "12")])
    sums = task("task3", ["Mathematics"], [("count them", "12")])
    items = with_true_answers(draw_items([good, bad, sums], 100, tokenizer, 400, Resembling(), rng(0)), tokenizer)
    prompts, answers = ([tokenizer.decode(rows[i]) for i in range(len(items))] for rows in (items.prompts, items.answers))
    assert sorted(answers) == sorted(f" yes {i}" for i in range(20))
    number = answers[0].split()[1]
    assert prompts[0] == ("Definition: say yes or no.\n\nPositive Example 1 -\nInput: is a a word\nOutput: no\n\n"
                          "Positive Example 2 -\nInput: is b a word\nOutput: no\n\n"
                          f"Now complete the following example -\nInput: is w{number} a word\nOutput:")
    assert all(items.answers[i][-1] == tokenizer.eos_id for i in range(len(items)))
    few = draw_items([good, bad, sums], 5, tokenizer, 400, (), rng(0))
    assert len(few) == 5 and few == draw_items([good, bad, sums], 5, tokenizer, 400, (), rng(0))
    with pytest.raises(ValueError, match="of 21 instruction items none can be used: raise --item-tokens, now 9"):
        draw_items([good, sums, task("task4", ["Kind"], [("a", "b")])], 5, tokenizer, 9, (), rng(0))


def test_splits_are_folders_or_lists(tmp_path, data):
    assert [t.name for t in load_split(data, "train")] == ["task1_a", "task2_b"]
    for name in ("task5_e", "task6_f", "task7_g"):
        write_task(tmp_path / "tasks", name)
    with pytest.raises(ValueError, match="tasks has no folder 'test', and .*test_tasks.txt is missing, the list of its test tasks"):
        load_split(tmp_path / "tasks", "test")
    lists = tmp_path / "splits" / "default"
    lists.mkdir(parents=True)
    (lists / "train_tasks.txt").write_text("task5_e\ntask7_g\ntask8_elsewhere\n")
    (lists / "test_tasks.txt").write_text("task6_f\n")
    assert [t.name for t in load_split(tmp_path / "tasks", "train")] == ["task5_e", "task7_g"]
    assert [t.name for t in load_split(tmp_path / "tasks", "test")] == ["task6_f"]


@pytest.mark.skipif(not REAL.exists(), reason="the real task files are not here (shared/data/natural_instructions)")
def test_the_real_collection_is_split_by_its_lists():
    train, test = (load_split(REAL, split) for split in ("train", "test"))
    assert len(train) == 28 and len(test) == 23 and not {t.name for t in train} & {t.name for t in test}
    items = draw_items(train, 60, byte_tokenizer(), 1000, Resembling(), np.random.default_rng(0))
    assert len(items) == 60


# --- the measures ---


def scripted(monkeypatch, *answers: str) -> list[str]:
    """`generate` answers so, in turn; returns the list of prompts that it will have been given."""
    asked, tokenizer = [], byte_tokenizer()

    def generate(model, prompts, *args, **how):
        asked.extend(map(tokenizer.decode, prompts))
        return [tokenizer.encode(text) if text else [] for text in answers[: len(prompts)]]
    monkeypatch.setattr(transfer_eval, "generate", generate)
    return asked


def test_measures_by_hand(monkeypatch):
    how = None, byte_tokenizer()
    asked = scripted(monkeypatch, "46", " 11", "10", "")
    assert transfer_eval.direct_accuracy(*how, ["1 2 + 3 4", "5 + 6", "5 + 5", "1 + 1"], None) == 75.0
    assert asked[0] == student_prompt("1 2 + 3 4")
    asked = scripted(monkeypatch, "5+5+0=10\n#10#", "5+6+0=11\n11", "1+1+0=02\n#3#")
    assert transfer_eval.scratchpad_accuracy(*how, ["5 + 5", "5 + 6", "1 + 1"], 99, None) == pytest.approx(100 / 3)
    assert asked[0] == teacher_prompt("5 + 5")
    some = problems()["test"][:3]
    asked = scripted(monkeypatch, f" {some[0].answer} of them", f"It is 0{some[1].answer}.", "many")
    assert transfer_eval.solved(*how, some, lambda text: f"Q {text}", None) == [1, 1, 0]
    assert asked[0] == f"Q {some[0].text}"
    scripted(monkeypatch, "yes", "maybe yes", "no")
    [points] = transfer_eval.rouge_by_task(*how, [task("t", [], [("a", "yes"), ("b", "yes"), ("c", "yes")])], 3, 9, None).values()
    assert points == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)


def test_an_answer_ends_with_its_line():
    """A plain language model goes on with the next example."""
    tokenizer, model = byte_tokenizer(), marking_decoder(byte_tokenizer())
    with torch.no_grad():
        model.lm_head.weight[tokenizer.encode("\n")[0], 0] = 99.0
    assert transfer_eval.complete(model, tokenizer, ["a"], 9, None) == [""]


def test_a_prompt_is_chosen_by_validation_and_shows_no_tested_problem(tmp_path):
    prompts = transfer_eval.problem_prompts()
    text = "Ada has 2 cups and finds 3 more. How many?"
    assert prompts["plain"](text) == f"Question: {text}\nAnswer:" and prompts["plain_examples"](text).endswith(prompts["plain"](text))
    shown = problems()["validation"][: transfer_eval.SHOWN]
    for name, prompt in prompts.items():
        assert text in prompt(text) and not any(p.text in prompt(text) for p in problems()["test"])
        assert all((f"{p.text}\n" in prompt(text) and f": {p.answer}\n" in prompt(text)) == ("examples" in name) for p in shown)
    assert all(f"{p.text}\nOutput: {p.a} + {p.b} = {p.a + p.b}\n" in prompts["sums"](text) for p in shown)
    assert transfer_eval.best_prompt({"plain": 1.0, "definition": 3.5, "plain_examples": 2.0}) == "definition"
    settings = transfer_eval.TransferEval()
    assert transfer_eval.prompt_of(tmp_path, settings) == "sums"
    (tmp_path / "problem_prompt.json").write_text(json.dumps({"plain": 5.0, "definition": 3.5}))
    assert transfer_eval.prompt_of(tmp_path, settings) == "plain"
    assert transfer_eval.prompt_of(tmp_path, transfer_eval.TransferEval(problem_prompt="definition")) == "definition"


def test_a_question_is_asked_in_its_form(monkeypatch):
    asked, settings = scripted(monkeypatch, " 46"), transfer_eval.TransferEval()
    assert transfer_eval.ask(None, byte_tokenizer(), "12 + 34", settings) == "46" and asked == [student_prompt("1 2 + 3 4")]
    transfer_eval.ask(None, byte_tokenizer(), "Ada has 2 cups + 3 spoons. How many?", settings)
    assert asked[1].startswith("Definition: Read the problem. Write the sum") and asked[1].endswith("Ada has 2 cups + 3 spoons. How many?\nOutput:")


def test_a_weak_teacher_is_not_distilled(tmp_path):
    made = experiment(tmp_path)
    made.folder.keep("teacher_validation", 12.5, None)
    with pytest.raises(ValueError, match="the teacher solves 12.5 % of the validation questions, below the floor of 50.0 %"):
        list(made.stages())


# --- the command ---


@pytest.fixture
def program(monkeypatch, capsys):
    """What train.py or eval.py prints. Few word problems: the model is random."""
    few = {split: some[:6] for split, some in problems().items()}
    monkeypatch.setattr(transfer, "problems", lambda: few)
    monkeypatch.setattr(transfer_eval, "problems", lambda: few)

    def run(name: str, *words) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--task", "transfer", *map(str, words)])
        capsys.readouterr()
        guarded(importlib.import_module(name).main)
        return capsys.readouterr().out
    return run


def test_the_command_runs_resumes_and_is_examined(program, base, data, tmp_path):
    out = tmp_path / "run"
    words = [*SMALL, "--model", base, "--data", data, "--out", out]
    said = program("train", *words)
    check_practice(out)
    record = json.loads((out / "record.json").read_text())
    rows = ("base", "before", "after", "alone")
    assert {f"{name}_{row}" for name in ("addition", "rouge", "problems") for row in rows} <= set(record["metrics"])
    assert record["scale"] == "smollm2" and set(record["p_value"]) == {"after", "alone"} and record["metrics"]["items"]["mean"] == 4
    assert set(record["files"]) == {f"{name}.json" for name in ("task1_a", "task2_b", "task3_c", "task4_d")}
    assert set(record["by_task"]["after"]) == {"task3_c", "task4_d"} and len(record["right"]["after"]) == 6
    assert "One practice item" in said and "| word problems, exact match, % |" in said and "paper, after" in said
    assert Transfer.headline(record).startswith("direct addition ")

    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    program("train", *words)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == stamps
    assert json.loads((out / "record.json").read_text())["metrics"] == record["metrics"]

    how = ["--model", out / "student", "--data", data, "--precision", "fp32", "--device", "cpu"]
    addition, rouge, solved = program("eval", *how, "--questions", 5, "--test-instances", 2).splitlines()
    assert addition.endswith(f"up to 2 digits: {record['metrics']['addition_after']['mean']:.2f} %")
    assert rouge == f"Rouge-L, 2 test tasks: {record['metrics']['rouge_after']['mean']:.1f}"
    assert solved.endswith(f"{record['metrics']['problems_after']['mean']:.1f} %")


def test_the_student_may_start_from_the_base_as_in_the_paper(program, base, tmp_path):
    """And without --data the instructions are the pocket world's."""
    said = program("train", *SMALL, "--item-tokens", 1000, "--test-instances", 1, "--test-tasks", 2, "--model", base, "--start", "base", "--item-answers", "own", "--lora-rank", 2, "--out", tmp_path)
    record = json.loads((tmp_path / "record.json").read_text())
    assert "The instructions are those of the pocket world, data/instructions" in said
    assert set(record["by_task"]) == {"before", "after", "alone"} and set(record["by_task"]["before"]) == {
        "task501_has_instrument_yes", "task502_starts_drink_true"}
    assert "as it came" not in Transfer.table(record) and "the student starts from the base" in Transfer.table(record)


def test_bad_data_is_one_sentence_before_anything_is_trained(program, base, data, tmp_path):
    for name, sentence in (("nowhere", "nowhere has no folder 'train'"), ("train", "train has no folder 'train'")):
        with pytest.raises(SystemExit, match=sentence) as stopped:
            program("train", *SMALL, "--model", base, "--data", data / name, "--out", tmp_path / name)
        assert len(str(stopped.value.code).splitlines()) == 1 and not list((tmp_path / name).rglob("*.safetensors"))
    for split, name in (("train", "task1_a"), ("test", "task1_a")):
        write_task(tmp_path / "both" / split, name)
    with pytest.raises(SystemExit, match="both: task1_a is a task for training and for tests"):
        program("train", *SMALL, "--model", base, "--data", tmp_path / "both", "--out", tmp_path / "out")


def test_what_is_reused_is_of_this_task_and_of_one_teacher(program, base, data, tmp_path):
    words = [*SMALL, "--model", base, "--data", data]
    RunFolder(tmp_path / "addition", torch.device("cpu")).claim(AdditionSettings(), 0)
    with pytest.raises(SystemExit, match="addition cannot be reused, it holds a run of another task"):
        program("train", *words, "--reuse", tmp_path / "addition", "--out", tmp_path / "own")
    for name in ("lender", "own"):
        program("train", *words, "--out", tmp_path / name)
    teacher = RunFolder(tmp_path / "own", torch.device("cpu")).get("teacher")
    with torch.no_grad():
        next(teacher.parameters()).add_(1.0)
    RunFolder(tmp_path / "own", torch.device("cpu")).keep("teacher", teacher, byte_tokenizer())
    (tmp_path / "own" / "practice.safetensors").unlink()
    with pytest.raises(SystemExit, match="own has a teacher of its own, so that of .*lender cannot be reused; choose"):
        program("train", *words, "--reuse", tmp_path / "lender", "--out", tmp_path / "own")


def test_instruction_items_may_be_answered_by_the_start(program, base, data, tmp_path):
    """The same prompts, with soft labels at the tokens that the teacher wrote, from which the student starts."""
    words = [*SMALL, "--model", base, "--data", data]
    program("train", *words, "--out", tmp_path / "true")
    program("train", *words, "--item-answers", "own", "--reuse", tmp_path / "true", "--out", tmp_path / "own")
    for name in ("teacher/model.safetensors", "practice.safetensors"):
        assert (tmp_path / "true" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()
    with pytest.raises(SystemExit, match="cannot be reused, its teacher has other settings: teacher_lr"):
        program("train", *words, "--teacher-lr", 1e-5, "--reuse", tmp_path / "true", "--out", tmp_path / "other")
    true, own = (RunFolder(tmp_path / answers, torch.device("cpu")).get("items") for answers in ("true", "own"))
    assert sorted(true.prompts[i] for i in range(4)) == sorted(own.prompts[i] for i in range(len(own))) and len(own) == 4
    assert true.labels.hard and not own.labels.hard and own.labels.kind == "sampled"
    assert {byte_tokenizer().decode(true.answers[i]) for i in range(4)} != {byte_tokenizer().decode(own.answers[i]) for i in range(4)}


@pytest.mark.parametrize("start", ["base", "teacher"])
def test_its_own_answers_are_those_of_the_model_it_starts_from(start, tmp_path, monkeypatch):
    made, asked = experiment(tmp_path, start=start, item_answers="own"), []
    monkeypatch.setattr(made, "model", lambda name: name)
    monkeypatch.setattr(transfer, "practice", lambda model, *a, **k: asked.append(model))
    monkeypatch.setattr(made, "items", lambda n, number: [("a", " b")])
    made.student_items()
    assert asked == [start]


@pytest.mark.parametrize("stop", ["line", "token"])
def test_its_sums_end_with_their_line_as_in_its_prompt_or_with_the_stop_token(stop, tmp_path, monkeypatch):
    made = experiment(tmp_path, student_stop=stop)
    eos, line = made.tokenizer.eos_id, made.tokenizer.encode_answer("\n")[0]
    labels = SoftLabels(Ragged.of([[7, 9], [eos], [8], [eos, 9]]), torch.tensor([60, 40, 100, 100, 98, 2]))
    practised = Examples(Ragged.of([[1], [2, eos]]), Ragged.of([[7, eos], [8, eos]]), labels)
    item = Examples.hard([[3]], [[4, eos]])
    monkeypatch.setattr(made.folder, "get", {"practice": practised, "items": item}.__getitem__)
    monkeypatch.setattr(made, "model", lambda name: name)
    monkeypatch.setattr(made, "fit_copy", lambda model, examples, *a: examples)
    both, alone = made.student("student"), made.student("student_alone")
    end = {"line": line, "token": eos}[stop]
    assert [both.answers[i] for i in range(3)] == [[7, end], [8, end], [4, eos]] and both.prompts[1] == [2, eos]
    assert [both.labels.ids[i] for i in range(4)] == [[7, 9], [end], [8], [end, 9]]
    assert both.labels.weights[:6].tolist() == [60, 40, 100, 100, 98, 2]
    assert [alone.answers[i] for i in range(len(alone))] == [[7, end], [8, end]]
    assert practised.answers[0] == [7, eos]  # what is on disk stays as it is


def test_no_token_stands_twice_in_an_exact_label_that_ends_with_a_line(tmp_path):
    """A loss that asks what no label names would let the student put any probability on the stop token."""
    tokenizer = experiment(tmp_path).tokenizer
    eos, line, size = tokenizer.eos_id, tokenizer.encode_answer("\n")[0], 300
    q = torch.randn(1, size).softmax(-1)
    made = ending_lines(Examples(Ragged.of([[1]]), Ragged.of([[eos]]), SoftLabels.of_probabilities(torch.arange(size)[None], q)), tokenizer)
    dense = torch.zeros(size).index_add(0, made.labels.ids.values.long(), made.labels.weights)
    assert made.answers[0] == [line] and sorted(made.labels.ids[0]) == list(range(size))
    assert dense[line] == q[0, eos] and dense[eos] == q[0, line] and made.labels.kind == "exact"


def test_a_tokenizer_without_an_end_of_line_is_one_sentence():
    with pytest.raises(ValueError, match="no token for the end of a line: say --student-stop token"):
        end_of_line(word_tokenizer(["1", "2"]))


def test_few_instruction_items_come_again(tmp_path, monkeypatch):
    made = experiment(tmp_path, student_items=7, item_answers="true")
    monkeypatch.setattr(made, "items", lambda n, number: [("a b", " c"), ("d", " e f"), ("g", " h")])
    items = made.student_items()
    assert [made.tokenizer.decode(items.prompts[i]) for i in range(7)] == ["a b", "d", "g", "a b", "d", "g", "a b"]


def check_practice(run: Path) -> None:
    """f has kept the digits between the marks; the student's prompt has no scratchpad."""
    practised, tokenizer = RunFolder(run, torch.device("cpu")).get("practice"), byte_tokenizer()
    assert len(practised) >= 2
    for i in range(len(practised)):
        assert tokenizer.decode(practised.answers[i]).isdigit() and practised.answers[i][-1] == tokenizer.eos_id
        assert tokenizer.decode(practised.prompts[i]) == student_prompt(practised.input(i))
        assert split_of(practised.input(i)) == "practice"
