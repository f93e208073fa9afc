"""Addition: the text of the questions and scratchpads re-checked by other arithmetic, the extractor, the splits, the scores."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.world.lists import pocket_tokenizer
from minicd.hf.tokenizers import read_tokenizer
from minicd.labels import Examples, Ragged
from minicd.tasks import addition
from minicd.tasks.folder import RunFolder
from minicd.tasks.parts import addition_eval, addition_questions as text
from minicd.tasks.parts.addition_eval import AdditionEval
from minicd.tasks.record import make_record
from minicd.tasks.run import seed_folder
from minicd.tokenizer import TextTokenizer

T5_FILE = "../shared/data/tokenizers/t5/tokenizer.json"


@pytest.fixture(scope="module", params=["pocket", "t5"])
def tokenizer(request) -> TextTokenizer:
    if request.param == "pocket":
        return pocket_tokenizer()
    path = Path(__file__).resolve().parent.parent / T5_FILE
    if not path.exists():
        pytest.skip(f"T5's own tokenizer is not at {T5_FILE}")
    return read_tokenizer(path)


@pytest.fixture(params=["compact", "nye"])
def style(request) -> str:
    return request.param


def spaced(number) -> str:
    return " ".join(str(number))


def random_pairs(n: int, seed: int) -> list[tuple[str, str]]:
    """Operands as digit strings: corner cases first, then random ones of 1 to 8 digits."""
    pairs = [(str(a), str(b)) for a in (0, 1, 5, 9) for b in (0, 4, 5, 9)]
    pairs += [("9" * k, "9" * k) for k in range(1, 9)] + [("1" + "0" * k, "9" + "0" * k) for k in range(1, 8)]
    rng = random.Random(seed)
    for _ in range(n):
        k = rng.randint(1, 8)
        low = 10 ** (k - 1) if k > 1 else 0
        pairs.append((str(rng.randrange(low, 10**k)), str(rng.randrange(low, 10**k))))
    return pairs


def random_questions(n: int, seed: int) -> list[str]:
    return [f"{spaced(a)} + {spaced(b)}" for a, b in random_pairs(n, seed)]


def sum_of(question: str) -> int:
    return sum(int(side.replace(" ", "")) for side in question.split(" + "))


def carry_into(column: int, a: str, b: str) -> int:
    """What the columns to the right of `column` (0 is the last) carry into it: the sum of what they hold, without any steps."""
    return (int(a) % 10**column + int(b) % 10**column) // 10**column


def low_digits(column: int, a: str, b: str) -> list[str]:
    """The last `column` digits of the sum."""
    return list(f"{(int(a) + int(b)) % 10**column:0{column}d}") if column else []


def test_compact_scratchpads_step_by_step():
    for a, b in random_pairs(300, seed=1):
        *steps, end = text.compact_scratchpad(f"{spaced(a)} + {spaced(b)}").split(" , ")
        assert len(steps) == len(a)
        for column, step in enumerate(steps):
            x, y, carry, digit = re.fullmatch(r"(\d) (\d) C: (\d) => (\d)", step).groups()
            assert (x, y) == (a[-1 - column], b[-1 - column])
            assert int(carry) == carry_into(column, a, b)
            assert [digit] == low_digits(column + 1, a, b)[:1]
        carry, final = re.fullmatch(r"C: (\d) # (\d(?: \d)*) #", end).groups()
        assert int(carry) == carry_into(len(a), a, b)
        assert final == spaced(int(a) + int(b))


def test_nye_scratchpads_step_by_step():
    for a, b in random_pairs(300, seed=2):
        *lines, end = text.nye_scratchpad(f"{spaced(a)} + {spaced(b)}").split(" => ")
        assert len(lines) == len(a) + 1
        for column, line in enumerate(lines):
            rest, result, carry = re.fullmatch(r"(.*?) ?, ((?:\d )*)C: (\d)", line).groups()
            left = len(a) - column
            assert rest == (f"{spaced(a[:left])} + {spaced(b[:left])}" if left else "")
            assert result.split() == low_digits(column, a, b)
            assert int(carry) == carry_into(column, a, b)
        digits, final = re.fullmatch(r"(\d(?: \d)*) Final answer: # (\d(?: \d)*) #", end).groups()
        assert digits.split() == [str(carry_into(len(a), a, b)), *low_digits(len(a), a, b)]
        assert final == spaced(int(a) + int(b))


def test_scratchpads_as_documented():
    """The paper's own example (with spaces around the #), the compact one, and the two templates."""
    assert text.nye_scratchpad("1 2 + 3 4") == ("1 2 + 3 4 , C: 0 => 1 + 3 , 6 C: 0 => , 4 6 C: 0 => 0 4 6 "
                                                "Final answer: # 4 6 #")
    assert text.compact_scratchpad("1 2 + 3 4") == "2 4 C: 0 => 6 , 1 3 C: 0 => 4 , C: 0 # 4 6 #"
    assert text.compact_scratchpad("9 9 + 9 9") == "9 9 C: 0 => 8 , 9 9 C: 1 => 9 , C: 1 # 1 9 8 #"
    assert text.nye_scratchpad("5 + 5") == "5 + 5 , C: 0 => , 0 C: 1 => 1 0 Final answer: # 1 0 #"
    assert text.compact_scratchpad("0 + 0") == "0 0 C: 0 => 0 , C: 0 # 0 #"
    assert list(text.FORMS) == ["compact", "nye", "lines"]
    assert text.teacher_template("1 + 2") == "add step by step : 1 + 2"
    assert text.student_template("1 + 2") == "add : 1 + 2"


@pytest.mark.parametrize("question, expected", [("1 2 + 3 4", "4 6"), ("9 9 + 9 9", "1 9 8"), ("0 + 0", "0"), ("5 + 5", "1 0"),
                                                ("1 0 0 + 9 0 0", "1 0 0 0"),
                                                ("9 9 9 9 9 9 9 9 + 9 9 9 9 9 9 9 9", "1 9 9 9 9 9 9 9 8")])
def test_answer(question, expected):
    assert text.answer(question) == expected


@pytest.mark.parametrize("question, expected", [("1 2 + 3 4", 0), ("0 + 0", 0), ("5 + 5", 1), ("9 5 + 0 5", 2), ("9 9 9 + 0 0 1", 3),
                                                ("5 0 5 + 5 0 5", 1), ("5 5 0 5 5 5 + 5 5 0 5 5 5", 3), ("5 5 5 0 5 + 5 5 5 0 5", 3),
                                                ("9 9 5 0 + 0 0 5 0", 3), ("9 0 9 + 0 9 0", 0), ("9 9 9 9 9 9 9 9 + 9 9 9 9 9 9 9 9", 8)])
def test_carry_run(question, expected):
    assert text.carry_run(question) == expected


def test_the_extractor_keeps_the_final_answer(tokenizer, style):
    extract = text.final_answer(tokenizer)
    for question in random_questions(300, seed=3):
        tokens = tokenizer.encode(text.FORMS[style].scratchpad(question))[:-1]
        found = extract(tokens)
        assert isinstance(found, slice) and found.stop <= len(tokens)
        assert tokenizer.decode(tokens[found]).replace(" ", "") == str(sum_of(question))


def test_the_extractor_refuses_what_was_cut_short(tokenizer, style):
    extract = text.final_answer(tokenizer)
    for question in random_questions(20, seed=4):
        tokens = tokenizer.encode(text.FORMS[style].scratchpad(question))[:-1]
        for end in range(len(tokens)):
            assert extract(tokens[:end]) is None, tokenizer.decode(tokens[:end])


@pytest.mark.parametrize("completion", ["", "4 6", "# 4 6", "4 6 #", "# #", "1 2 # # 4", "# 4 x 6 #", "# x #", "# 4 , 6 #", "# C: 0 #",
                                        "# add 6 #", "# 4 + 6 #", "# 4 6 # #", "2 4 C: 0 => 6 , 1 3 C: 0 => 4 , C: 0 4 6"])
def test_the_extractor_refuses_what_is_no_answer(tokenizer, completion):
    assert text.final_answer(tokenizer)(tokenizer.encode(completion)[:-1]) is None


def test_the_extractor_refuses_a_lone_space(tokenizer):
    """T5 has a token of nothing but a space, which may stand before a digit, but is no answer by itself."""
    space = tokenizer.backend.token_to_id("\u2581")
    if space is None:
        pytest.skip("this tokenizer has no token for a space")
    extract, mark = text.final_answer(tokenizer), tokenizer.encode("#")[0]
    zero = tokenizer.encode("0")[:-1]
    assert extract([mark, space, mark]) is None
    assert extract([mark, space, space, mark]) is None
    assert zero[0] == space and extract([mark, *zero, mark]) == slice(1, 1 + len(zero))


@pytest.mark.parametrize("completion, expected", [("# 1 # 4 6 #", "46"), ("# 4 6 # copy", "46"), ("x # 0 4 6 #", "046")])
def test_the_extractor_takes_the_last_two_marks(tokenizer, completion, expected):
    tokens = tokenizer.encode(completion)[:-1]
    assert tokenizer.decode(tokens[text.final_answer(tokenizer)(tokens)]).replace(" ", "") == expected


def test_no_scratchpad_is_longer_than_its_bound(tokenizer, style):
    """T5 writes 0 as two tokens, so the sum of nines is not the longest; a completion must never be cut short."""
    for k in (1, 3, 8):
        bound = text.longest_scratchpad(tokenizer, style, k)
        lengths = [len(tokenizer.encode(text.FORMS[style].scratchpad(q))) for q in random_questions(200, seed=5) if len(q) <= 4 * k + 1]
        assert max(lengths) <= bound <= 2 * max(lengths)


def test_questions_are_well_formed():
    for split in text.SPLITS:
        questions = text.draw_questions(500, 8, split, np.random.default_rng(0), unique=split != "practice")
        assert len(questions) == 500
        for question in questions:
            a, b = re.fullmatch(r"(\d(?: \d)*) \+ (\d(?: \d)*)", question).groups()
            assert len(a) == len(b) <= 15
            assert len(a) == 1 or (a[0] != "0" and b[0] != "0")
            assert text.split_of(question) == split


@pytest.mark.parametrize("max_digits", [3, 8])
def test_splits_are_disjoint_whatever_the_seed(max_digits):
    drawn = {split: set() for split in text.SPLITS}
    for split, questions in drawn.items():
        for seed in range(4):
            questions.update(text.draw_questions(1500, max_digits, split, np.random.default_rng(seed), unique=split != "practice"))
    assert set(drawn) == {"train", "validation", "test", "practice"}
    assert len(set.union(*drawn.values())) == sum(map(len, drawn.values())) > 8000


def test_the_splits_share_out_the_one_digit_questions():
    """Draw so many that every question turns up: each is in exactly one split, and none is missing."""
    parts = [set(text.draw_questions(2000, 1, split, np.random.default_rng(1), unique=False)) for split in text.SPLITS]
    assert all(len(part) >= 4 for part in parts)
    assert sum(map(len, parts)) == 100
    assert set.union(*parts) == {f"{a} + {b}" for a in range(10) for b in range(10)}


def test_lengths_of_practice_questions_are_uniform():
    questions = text.draw_questions(8000, 8, "practice", np.random.default_rng(2), unique=False)
    lengths = Counter(len(q.split(" + ")[0].split()) for q in questions)
    assert set(lengths) == set(range(1, 9))
    assert all(850 < n < 1150 for n in lengths.values()), lengths  # 1000 ± 5 standard deviations
    assert len(set(questions)) < len(questions)  # short ones repeat


def test_unique_questions_are_unique():
    for split in ("train", "validation", "test"):
        questions = text.draw_questions(3000, 4, split, np.random.default_rng(3))
        assert len(set(questions)) == 3000
    short = sum(len(q) == 5 for q in text.test_questions(5000, 8))
    assert short <= 20  # of one digit there are only as many as the split holds


def test_draws_are_repeatable():
    first, again, other = (text.draw_questions(50, 8, "train", np.random.default_rng(seed)) for seed in (4, 4, 5))
    assert first == again != other
    assert text.test_questions(50, 8) == text.test_questions(50, 8)
    assert {text.split_of(q) for q in text.test_questions(200, 8)} == {"test"}


@pytest.mark.parametrize("n, max_digits", [(11, 1), (101, 1), (2000, 2), (100_000, 3), (10**7, 4)])
def test_more_unique_questions_than_there_are(n, max_digits):
    with pytest.raises(ValueError, match=f"{n} different questions .* too many for the test split"):
        text.draw_questions(n, max_digits, "test", np.random.default_rng(0))


@pytest.mark.parametrize("max_digits", [0, -1, 19, 40])
def test_operands_that_numpy_cannot_hold(max_digits):
    with pytest.raises(ValueError, match="1 to 18 digits"):
        text.draw_questions(5, max_digits, "test", np.random.default_rng(0))


def test_eighteen_digits_still_add_up():
    longest = max(text.draw_questions(100, 18, "test", np.random.default_rng(0)), key=len)
    assert len(longest) == 4 * 18 + 1 and text.answer(longest) == spaced(sum_of(longest))


def test_the_context_draws_practice_questions(tokenizer):
    context = text.addition_context(tokenizer, 3)
    drawn = context.inputs(300, np.random.default_rng(0))
    assert len(drawn) == 300 and {text.split_of(q) for q in drawn} == {"practice"}
    assert context.inputs(300, np.random.default_rng(0)) == drawn
    assert context.teacher("1 + 2") == "add step by step : 1 + 2" and context.student("1 + 2") == "add : 1 + 2"
    tokens = tokenizer.encode("C: 0 # 3 #")[:-1]
    assert tokenizer.decode(tokens[context.extract(tokens)]).strip() == "3"


def texts(tokenizer, rows) -> list[str]:
    return [tokenizer.decode(rows[i]) for i in range(len(rows))]


def test_supervised_examples_spell_out_prompts_and_answers(tokenizer, style):
    questions = random_questions(10, seed=6)
    scratchpads = addition.scratchpad_examples(questions, tokenizer, style)
    direct = addition.direct_examples(questions, tokenizer, "compact")
    assert texts(tokenizer, scratchpads.prompts) == [f"add step by step : {q}" for q in questions]
    assert texts(tokenizer, scratchpads.answers) == [text.FORMS[style].scratchpad(q) for q in questions]
    assert texts(tokenizer, direct.prompts) == [f"add : {q}" for q in questions]
    assert texts(tokenizer, direct.answers) == [spaced(sum_of(q)) for q in questions]
    assert all(direct.answers[i][-1] == tokenizer.eos_id for i in range(len(questions)))


@pytest.mark.parametrize("with_inputs", [True, False])  # practice sets of earlier versions lack them
def test_true_answers_put_the_sums_in_place_of_the_labels(tokenizer, with_inputs):
    questions = random_questions(50, seed=7)
    prompts = tokenizer.encode_all([text.student_template(q) for q in questions])
    wrong = Examples.hard(prompts, tokenizer.encode_all(["7"] * len(questions)))
    wrong.inputs = Ragged.of_texts(questions) if with_inputs else None
    true = addition.Addition.true_answers(SimpleNamespace(
        tokenizer=tokenizer, settings=addition.AdditionSettings()), wrong)
    assert [true.prompts[i] for i in range(len(true))] == prompts
    assert texts(tokenizer, true.answers) == [spaced(sum_of(q)) for q in questions]
    assert true.labels.ids.values.tolist() == true.answers.values.tolist()


@pytest.fixture
def scripted(monkeypatch):
    """Replace the model by answers that are written here; returns what generate() was asked."""
    def script(tokenizer, answers: list[str]) -> dict:
        asked = {}

        def generate(model, prompts, max_new_tokens, temperature=1.0, **more):
            asked.update(prompts=prompts, max_new_tokens=max_new_tokens, temperature=temperature)
            return [tokenizer.encode(answer)[:-1] for answer in answers]
        monkeypatch.setattr(addition_eval, "generate", generate)
        return asked
    return script


def test_evaluate_counts_exact_answers(scripted):
    tokenizer = pocket_tokenizer()
    cases = [("1 + 2", "3", True), ("5 + 5", "1 0", True), ("4 + 4", "0 8", False), ("1 2 + 3 4", "4 6", True),
             ("1 2 + 3 5", "4 6", False), ("9 9 + 9 9", "1 9 8", True), ("9 9 + 0 1", "", False),
             ("9 9 9 + 1 1 1", "1 1 1 0 #", False), ("1 0 0 + 2 0 0", "3 0", False)]
    asked = scripted(tokenizer, [answer for _, answer, _ in cases])
    score = addition_eval.evaluate(None, tokenizer, [q for q, _, _ in cases], False, 7)
    assert asked["temperature"] == 0 and asked["max_new_tokens"] == 7
    assert [tokenizer.decode(p) for p in asked["prompts"]] == [f"add : {q}" for q, _, _ in cases]
    assert score["accuracy"] == pytest.approx(100 * 4 / 9)
    assert score["by_digits"] == {"1": 66.67, "2": 50.0, "3": 0.0}
    # no carry: 1+2, 4+4, 12+34, 12+35, 100+200; one column: 5+5; two: 99+99, 99+01; three: 999+111
    assert score["by_carry_run"] == {"0": 40.0, "1": 100.0, "2": 50.0, "3": 0.0}
    # words of the prompts (2 + 3, 5 or 7) and of the answers, and a stop token for each of both
    prompts, answers = 3 * 5 + 4 * 7 + 2 * 9, 1 + 2 + 2 + 2 + 2 + 3 + 0 + 5 + 2
    assert score["tokens"] == pytest.approx((prompts + answers + 2 * 9) / 9)


def test_evaluate_reads_the_answer_out_of_a_scratchpad(scripted, tokenizer):
    good = text.compact_scratchpad
    cases = [("1 2 + 3 4", good("1 2 + 3 4"), True), ("5 6 + 7 8", text.nye_scratchpad("5 6 + 7 8"), True),
             ("1 2 + 3 5", good("1 2 + 3 4"), False), ("1 + 1", "2", False), ("1 + 2", "C: 0 # 3", False), ("0 + 0", "# 0 #", True),
             ("3 + 3", "# 0 6 #", False), ("8 + 8", "2 4 nonsense # 1 6 #", True)]
    asked = scripted(tokenizer, [answer for _, answer, _ in cases])
    score = addition_eval.evaluate(None, tokenizer, [q for q, _, _ in cases], True, 99)
    assert [tokenizer.decode(p) for p in asked["prompts"]] == [f"add step by step : {q}" for q, _, _ in cases]
    assert score["accuracy"] == 50.0
    assert score["by_digits"] == {"1": 40.0, "2": 66.67}
    assert score["by_carry_run"] == {"0": pytest.approx(100 * 2 / 6, abs=0.01), "1": 100.0, "2": 100.0}


def seed_scores(teacher: float, after: float, tokens: float) -> dict:
    nothing = {"accuracy": 0.0, "tokens": 10.0, "by_digits": {"1": 0.0, "2": 0.0}, "by_carry_run": {"0": 0.0}}
    return {**dict.fromkeys(addition.MODELS, nothing),
            "teacher": {"accuracy": teacher, "tokens": tokens, "by_digits": {"1": teacher, "2": 50.0}, "by_carry_run": {"0": 1.0}},
            "after": {"accuracy": after, "tokens": 10.0, "by_digits": {"1": 100.0, "2": after}, "by_carry_run": {"0": 2.0}}}


@pytest.fixture
def make(tmp_path):
    """A function from the scores of some seeds to their record; the run folders hold what the stages leave and note."""
    def record(scores: list[dict]) -> dict:
        settings, seeds = addition.AdditionSettings(), list(range(len(scores)))
        folders = [RunFolder(seed_folder(tmp_path, seed), torch.device("cpu")) for seed in seeds]
        for folder, rows in zip(folders, scores):
            for row, score in rows.items():
                folder.keep(f"test_{row}", score, None)
            folder.keep("practice_figures", {"practice_true": 97.0, "practice_dropped": 1.0, "shown": "an item"}, None)
            folder.note("teacher", minutes=1.0, hardware="a machine", losses=[2.0, 0.25])
            folder.note("practice", minutes=0.5, hardware="a machine")
        figures = [addition.Addition(settings, seed, folder).figures() for seed, folder in zip(seeds, folders)]
        return make_record("addition", settings, seeds, figures, [folder.notes() for folder in folders], addition.Addition.PAPER)
    return record


def test_the_record_of_three_seeds(make):
    record = json.loads(json.dumps(make([seed_scores(90, 10, 60), seed_scores(92, 20, 70), seed_scores(97, 60, 80)])))
    assert record["metrics"]["teacher"] == {"values": [90, 92, 97], "mean": 93.0, "std": 3.6056}  # √((9 + 1 + 16) / 2)
    assert record["metrics"]["after"] == {"values": [10, 20, 60], "mean": 30.0, "std": 26.4575}  # √((400 + 100 + 900) / 2)
    assert record["metrics"]["token_ratio"] == {"values": [6.0, 7.0, 8.0], "mean": 7.0, "std": 1.0}
    assert record["by_digits"]["teacher"] == {"1": 93.0, "2": 50.0}
    assert record["by_digits"]["after"] == {"1": 100.0, "2": 30.0}
    assert record["by_carry_run"] == {**dict.fromkeys(addition.MODELS, {"0": 0.0}), "teacher": {"0": 1.0}, "after": {"0": 2.0}}
    assert record["seeds"] == [0, 1, 2]
    assert record["minutes"] == {"total": [1.5] * 3, "teacher": [1.0] * 3, "practice": [0.5] * 3}
    assert record["hardware"] == "a machine"
    assert record["metrics"]["practice_true"] == {"values": [97.0] * 3, "mean": 97.0, "std": 0.0}
    assert record["final_losses"] == {"teacher": [0.25] * 3}
    assert record["paper"]["teacher"] == 93 and record["paper"]["after"] == 95 and record["paper"]["token_ratio"] == 8.0


def test_the_record_of_one_seed_has_no_spread(make):
    assert make([seed_scores(90, 10, 60)])["metrics"]["teacher"] == {"values": [90], "mean": 90, "std": None}


@pytest.mark.parametrize("question", ["", "12", "1 + 2 + 3", "twelve + 3", "12 - 3", "1.5 + 2", "+", "1 +", "\u00b2 + 3"])
def test_ask_wants_a_sum_of_two_numbers(question):
    with pytest.raises(ValueError, match="ask for the sum of two numbers"):
        addition_eval.ask(None, pocket_tokenizer(), question, AdditionEval())


@pytest.mark.parametrize("question", ["12+34", " 12 + 34 "])
def test_ask_writes_the_prompt_of_the_templates(scripted, question):
    tokenizer = pocket_tokenizer()
    asked = scripted(tokenizer, ["4 6"])
    assert addition_eval.ask(None, tokenizer, question, AdditionEval(max_new_tokens=9)) == "46"
    assert tokenizer.decode(asked["prompts"][0]) == "add : 1 2 + 3 4"
    scripted(tokenizer, ["C: 0 # 4 6 #"])
    assert addition_eval.ask(None, tokenizer, question, AdditionEval(step_by_step=True)) == "C: 0 # 4 6 #"


def test_a_model_that_practised_the_test_is_not_scored(tmp_path):
    tokenizer = pocket_tokenizer()
    tested, practised = text.test_questions(20, 8), text.draw_questions(20, 8, "practice", np.random.default_rng(0))
    addition_eval.check_unseen(tested, tmp_path, tokenizer, "compact")  # no practice set there
    addition.direct_examples(practised, tokenizer, "compact").save(tmp_path / "practice.safetensors")
    addition_eval.check_unseen(tested, tmp_path, tokenizer, "compact")
    addition.direct_examples(practised + tested[-1:], tokenizer, "compact").save(tmp_path / "practice.safetensors")
    with pytest.raises(ValueError, match="practice.safetensors holds test questions"):
        addition_eval.check_unseen(tested, tmp_path, tokenizer, "compact")
