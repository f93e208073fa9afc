"""The pocket base: its text holds no addition, its batches can be taken up at any step, its checkpoint can copy and not add."""

import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.world import bases, lists
from data.world.bases import PocketText, pocket_config
from data.world.lists import pocket_item, pocket_tokenizer
from minicd.hf.checkpoint import load
from minicd.sampling import generate
from minicd.tasks.parts import addition_questions
from minicd.tasks.parts.addition_eval import evaluate

BASE = Path(__file__).resolve().parent.parent / "data" / "pocket"
LONGEST = (1, 2, 4, 8, 11)
EACH = 5000  # items for each of LONGEST
COLUMN = re.compile(r"(\d) (\d) C: (\d) => (\d)")


def items(longest: int, n: int = EACH) -> list[tuple[str, str]]:
    rng = random.Random(f"test/{longest}")
    return [pocket_item(rng, longest) for _ in range(n)]


def two_lists(prompt: str) -> tuple[list[str], list[str]] | None:
    """The lists on either side of a separator."""
    sides = re.split(r" [|&;@~^] ", prompt.split(" : ", 1)[1])
    return (sides[0].split(), sides[1].split()) if len(sides) == 2 else None


def sums(prompt: str, answer: str) -> list[str]:
    """What in this item is the result of an addition: its answer, the number between its marks, the digit of a column."""
    found = [column.group() for column in COLUMN.finditer(answer)
             if int(column[4]) == (int(column[1]) + int(column[2]) + int(column[3])) % 10]
    lists = two_lists(prompt)
    if lists and all("".join(side).isdigit() for side in lists):
        total = sum(int("".join(side)) for side in lists)
        numbers = [answer.replace(" ", ""), *(n.replace(" ", "") for n in re.findall(r"# ([\d ]+) #", answer))]
        found += [n for n in numbers if n.isdigit() and int(n) == total]
    return found


@pytest.mark.parametrize("item", [("join : 1 2 | 3 4", "4 6"), ("max : 0 ; 5", "5"), ("op0 step by step : 1 ~ 3", "1 3 C: 0 => 7 , C: 0 # 4 #"),
                                  ("op0 step by step : 1 & 3", "1 3 C: 1 => 5 , C: 0 # 5 #"), ("pair1 : 9 9 @ 0 1", "1 0 0")])
def test_the_scan_finds_a_sum(item):
    assert sums(*item)


@pytest.mark.parametrize("longest", LONGEST)
def test_no_item_adds(longest):
    seen = {"lists": 0, "columns": 0}
    for prompt, answer in items(longest):
        assert not sums(prompt, answer), (prompt, answer)
        assert "+" not in prompt + answer and "add" not in (prompt + " " + answer).split(), (prompt, answer)
        seen["lists"] += two_lists(prompt) is not None
        seen["columns"] += len(COLUMN.findall(answer))
    assert seen["lists"] > 0.4 * EACH and seen["columns"] > 0.2 * EACH  # the scan had something to look at


def test_no_single_column_of_a_pairing_adds():
    """Stricter than for whole numbers: the made-up pairings never give the last digit of the sum in any column."""
    columns = 0
    for prompt, answer in items(8, 20_000):
        if prompt.startswith("pair"):
            a, b = two_lists(prompt)
            assert len(a) == len(b) == len(answer.split())
            for x, y, z in zip(a, b, answer.split()):
                columns += 1
                assert int(z) != (int(x) + int(y)) % 10, (prompt, answer)
    assert columns > 1000


@pytest.mark.parametrize("name", lists.OPERATIONS + lists.PAIRINGS)
def test_made_up_tables_differ_from_addition_in_every_entry(name):
    table = lists.made_up_table(name)
    assert len(table) == 200
    for (a, b, carry), (digit, new_carry) in table.items():
        assert int(digit) != (int(a) + int(b) + int(carry)) % 10
        assert digit in lists.DIGITS and new_carry in ("0", "1")
    assert lists.made_up_table(name) == table == lists.TABLES[name]
    assert len({tuple(t.items()) for t in lists.TABLES.values()}) == len(lists.TABLES)


def test_the_items_of_lists_are_what_they_say():
    """Every answer worked out again; the lookups among them, where a single digit may well be the sum of two others."""
    larger = {"max": max, "min": min}
    tasks = set()
    for prompt, answer in items(8):
        head, rest = prompt.split(" : ", 1)
        task, x, y = head.split()[0], rest.split(), answer.split()
        tasks.add(task)
        if task == "replace":
            _, old, _, new = head.split()
            assert y == [new if symbol == old else symbol for symbol in x]
        elif task == "find":
            after = dict(zip(x, x[1:] + ["?"]))
            assert y == [after[head.split()[1]]]
        elif task in ("copy", "reverse", "first", "last", "rest", "most"):
            assert y == {"copy": x, "reverse": list(reversed(x)), "first": [x[0]], "last": [x[-1]],
                         "rest": x[1:], "most": x[:-1]}[task]
        elif task in larger:
            assert y == [larger[task](pair) for pair in zip(*two_lists(prompt))]
        elif task == "join":
            assert y == sum(two_lists(prompt), [])
        elif task in ("zip", "columns"):
            a, b = two_lists(prompt)
            assert y == [s for pair in list(zip(a, b))[:: 1 if task == "zip" else -1] for s in pair]
    assert tasks == {*lists.TASKS, *lists.OPERATIONS, *lists.PAIRINGS}


def test_every_item_and_every_addition_can_be_written():
    tokenizer = pocket_tokenizer()
    unknown = tokenizer.backend.token_to_id("<unk>")
    texts = [part for longest in LONGEST for item in items(longest) for part in item]
    question = "1 2 3 4 5 6 7 8 + 9 0 0 9 9 0 0 9"
    texts += [addition_questions.teacher_template(question), addition_questions.student_template(question),
              addition_questions.answer(question), *(addition_questions.FORMS[form].scratchpad(question) for form in ("compact", "nye"))]
    for text, tokens in zip(texts, tokenizer.encode_all(texts)):
        assert unknown not in tokens, text
        assert tokenizer.decode(tokens) == text


def batch_tensors(text: PocketText, step: int) -> list[torch.Tensor]:
    prompts, labels = text[step]
    return [prompts, *vars(labels).values()]


def test_batches_are_a_function_of_seed_and_step():
    tokenizer = pocket_tokenizer()
    onward, jumping, other = (PocketText(tokenizer, 64, 4, seed) for seed in (3, 3, 4))
    steps = [0, 1, 15, 16, 40, 63]
    forward = {step: batch_tensors(onward, step) for step in range(64) if step in steps}
    for step in reversed(steps):
        for ours, theirs in zip(forward[step], batch_tensors(jumping, step), strict=True):
            assert torch.equal(ours, theirs)
        assert not torch.equal(forward[step][0], batch_tensors(other, step)[0])
    assert len(onward) == 64
    rows = {tuple(row) for step in range(64) for row in onward[step][0].tolist()}
    assert len(rows) > 200  # of 256: nothing but the shortest items repeats


def test_short_lists_come_first():
    text = PocketText(pocket_tokenizer(), 800, 64, seed=0)

    def longest(window: int) -> int:
        prompts = text.make(window).prompts
        drawn = [text.tokenizer.decode(prompts[i]).split(" : ", 1)[1] for i in range(len(prompts))]
        return max(len(side.split()) for both in drawn for side in re.split(r" [|&;@~^] ", both))
    lengths = [longest(window) for window in (0, 12, 24, 49)]
    assert lengths == [4, 7, 11, 11]  # 4 + 14 · share of the steps, at most 11


@pytest.fixture(scope="module")
def base():
    if not (BASE / "model.safetensors").exists():
        pytest.skip("data/pocket holds no checkpoint; `python train.py --task pocket --base lists --publish` makes it")
    return load(BASE)


def test_the_base_is_small(base):
    model, tokenizer = base
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 10 * 2**20
    assert tokenizer.backend.get_vocab() == pocket_tokenizer().backend.get_vocab()
    assert model.config == pocket_config(model.config.vocab_size)


def test_the_base_copies(base):
    model, tokenizer = base
    rng = random.Random("copy")
    drawn = [" ".join(rng.choices(lists.SYMBOLS, k=rng.randint(1, 8))) for _ in range(100)]
    completions = generate(model, tokenizer.encode_all([f"copy : {x}" for x in drawn]), 12, temperature=0)
    assert sum(tokenizer.decode(c) == x for c, x in zip(completions, drawn)) >= 90


def test_the_base_cannot_add(base):
    """The paper's "before": the skill must come from the teacher's labelled questions, not from pretraining."""
    model, tokenizer = base
    questions = addition_questions.test_questions(200, 8)
    for step_by_step in (False, True):
        assert evaluate(model, tokenizer, questions, step_by_step, 100)["accuracy"] <= 5


def test_the_plain_text_has_no_scratchpads():
    rng = random.Random(0)
    texts = [lists.plain_item(rng, done=1.0) for _ in range(2000)]
    assert not any("step by step" in prompt or "#" in answer or "C:" in answer for prompt, answer in texts)
    assert sum(lists.list_item(rng, 1.0)[1].endswith("#") for _ in range(2000)) > 400  # the usual one has


def test_a_plain_base_is_of_lists_and_never_installed(tmp_path):
    with pytest.raises(ValueError, match="--plain: only the base of lists has scratchpads"):
        bases.PocketSettings(plain=True)
    settings = bases.PocketSettings(base="lists", plain=True)
    assert bases.Pocket.record_scale(settings) == "plain"
    bases.Pocket(settings, 0, SimpleNamespace(device="cpu")).publish()  # or it would ask the folder for its base
