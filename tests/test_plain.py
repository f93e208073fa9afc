"""Instructions with a plain language model: where its answers end, its inputs, the real collection's shape, the record."""

import hashlib
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minicd.decoder import Decoder, initialise
from minicd.distill import Context, PracticeSettings, identity, practice
from minicd.hf.checkpoint import load, save
from minicd.hf.families import read_config
from minicd.sampling import generate
from minicd.tasks.parts.inputs import NearCopies, few_shot_inputs
from minicd.tasks.parts.instruction_eval import TaskEval, end_with_line, marked, numbered
from minicd.tasks.parts.natural_instructions import inputs_prompt, load_task, official_tests, read_input
from minicd.tasks.settings import guarded
from minicd.tokenizer import TextTokenizer

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data" / "natural_instructions"
SMOLLM2 = ROOT / "data" / "smollm2"
CHARACTERS = [*"abcdefghijklmnopqrstuvwxyz", *"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ:.-\\", "Ġ", "Ċ", "ĊĊ"]
RAW = {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": False, "hidden_size": 16, "intermediate_size": 24,
       "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
       "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "eos_token_id": 0}
SMALL = ["--practice-inputs", 12, "--epochs", 1, "--batch-size", 4, "--label-samples", 5, "--test-instances", 3, "--device", "cpu",
         "--max-new-tokens", 5, "--jobs", 1, "--precision", "fp32"]


def tiny_tokenizer() -> TextTokenizer:
    vocabulary = {token: i for i, token in enumerate(["<end>", *CHARACTERS])}
    backend = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return TextTokenizer(backend, eos="<end>", pad=None, ends_prompts=False)


def tiny_decoder(tokenizer: TextTokenizer, share: float = 0.2) -> Decoder:
    """Random, but for the probability `share` of a new line everywhere, by a constant feature."""
    model = initialise(Decoder(read_config({**RAW, "vocab_size": len(tokenizer)})), seed=0).eval()
    [line] = tokenizer.encode("\n")
    with torch.no_grad():
        model.tokens.weight[:, 0], model.lm_head.weight[:, 0] = 30.0, 0.0
        model.lm_head.weight[line, 0] = math.log(share / (1 - share) * len(tokenizer)) / 16**0.5
    return model


@pytest.fixture
def plain() -> tuple[Decoder, TextTokenizer]:
    tokenizer = tiny_tokenizer()
    model = tiny_decoder(tokenizer)
    end_with_line(model, tokenizer)
    return model, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path, tokenizer = tmp_path_factory.mktemp("decoder"), tiny_tokenizer()
    save(tiny_decoder(tokenizer), tokenizer, path)
    return path


def examples(*inputs: str) -> list[dict]:
    return [{"input": text, "output": "yes", "explanation": "it is so"} for text in inputs]


def write_task(place: Path, name: str, instances: int = 152, text: str = "is {} a word") -> None:
    place.mkdir(parents=True, exist_ok=True)
    each = [{"id": f"{name}-{i}", "input": text.format(f"w{i}"), "output": ["yes" if i % 2 else "no"]} for i in range(instances)]
    (place / f"{name}.json").write_text(json.dumps({
        "Definition": ["say yes or no."], "Categories": ["Kind"], "Instances": each,
        "Positive Examples": examples("is a b", "is c d", "is e"), "Negative Examples": examples("is f g")}))


def test_a_new_line_ends_a_completion(plain, tmp_path):
    """Also a token of two; and the model stays like this when it is saved and loaded."""
    model, tokenizer = plain
    assert [tokenizer.decode([i]) for i in model.config.more_eos_token_ids] == ["\n", "\n\n"]
    prompts = tokenizer.encode_all(["a", "b c"] * 50)
    found, why = generate(model, prompts, 40, generator=torch.Generator().manual_seed(0), reasons=True)
    assert why.count("eos") > 90 and not any("\n" in tokenizer.decode(y) for y in found) and max(map(len, found)) > 3
    save(model, tokenizer, tmp_path)
    again = load(tmp_path)[0]
    assert again.config.more_eos_token_ids == model.config.more_eos_token_ids and again.config.eos_token_id == 0
    assert generate(again, prompts, 40, generator=torch.Generator().manual_seed(0)) == found


def test_the_student_learns_to_stop_as_softly_as_the_teacher_does(plain):
    """f is the identity: the teacher's new line is a token of its answer, with its own label and no other."""
    model, tokenizer = plain
    context = Context(lambda n, rng: ["a b"] * n, lambda x: f"do it: {x}", marked, identity)
    items = practice(model, tokenizer, context, 200, PracticeSettings("exact", max_new_tokens=60))
    labels, ends = items.labels, items.answers.starts[1:] - 1
    lines = torch.tensor(model.config.more_eos_token_ids)
    shares = [labels.weights[labels.ids.starts[row] : labels.ids.starts[row + 1]][torch.isin(
        labels.ids.values[labels.ids.starts[row] : labels.ids.starts[row + 1]], lines)].sum().item() for row in ends.tolist()]
    assert np.mean(shares) == pytest.approx(0.2, abs=0.05) and np.ptp(shares) < 0.1


def test_only_language_models_with_new_lines_are_plain():
    from helpers import tiny_t5

    from minicd.tokenizer import word_tokenizer
    with pytest.raises(ValueError, match="--plain is for decoders"):
        end_with_line(tiny_t5(4), word_tokenizer(["a"]))


def test_a_bare_input_gets_a_mark():
    assert marked(" is it? \n") == "is it?\nOutput:" and marked("Input: a\nOutput:") == "Input: a\nOutput:"
    assert numbered(3, TaskEval(plain=True))("a") == "task 3 : a\nOutput:" and numbered(3, TaskEval())("a") == "task 3 : a"


def test_an_input_of_several_lines_is_written_on_one(plain):
    assert inputs_prompt(["a\nb", "c"]) == "Input: a\\nb\nInput: c\nInput:" and read_input(" a\\nb ") == "a\nb"
    draw = few_shot_inputs(*plain, ["a\nb", "c d"], 2, 60)
    texts = draw(100, np.random.default_rng(0))
    assert len(texts) == 100 and all(texts) and not any("\n" in text for text in texts)  # it would have to write \n


def test_near_copies_have_the_same_words():
    known = NearCopies(["Is it so?", "a  B"])
    assert "is it SO" in known and "a b." in known and "is so it" not in known and "ab" not in known


def test_sums_with_other_signs_are_no_near_copies():
    known = NearCopies(["3 + 4", "2x > 1", "a well-known fact - so", ":-)"])
    assert "3+4." in known and "A well known fact: so" in known and ":-)" in known
    assert not any(text in known for text in ("3 - 4", "3 * 4", "2x < 1", "2x = 1", ":-("))


def test_the_collection_is_read_without_its_training_tasks(tmp_path):
    assert official_tests(tmp_path / "tasks") is None
    (tmp_path / "splits" / "default").mkdir(parents=True)
    (tmp_path / "splits" / "default" / "test_tasks.txt").write_text("task1_a\ntask2_b\n")
    assert official_tests(tmp_path / "tasks") == {"task1_a", "task2_b"}


@pytest.fixture
def run(monkeypatch):
    def start(program: str, *words) -> None:
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *map(str, words)])
        guarded(importlib.import_module(program).main)
    return start


@pytest.fixture
def collection(tmp_path) -> Path:
    """Two usable test tasks, two that are not, and a training task."""
    tasks = tmp_path / "ni" / "tasks"
    for name in ("task1_a", "task2_b", "task9_training"):
        write_task(tasks, name)
    write_task(tasks, "task3_few", instances=120)
    write_task(tasks, "task4_long", text="is {} " + "word " * 200)
    (tmp_path / "ni" / "splits" / "default").mkdir(parents=True)
    (tmp_path / "ni" / "splits" / "default" / "test_tasks.txt").write_text("task1_a\ntask2_b\ntask3_few\ntask4_long\ntask5_not_here\n")
    return tasks


def test_the_experiment_has_both_students_and_names_its_files(folder, collection, run, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--scale", "smollm2", "--model", folder, "--data", collection, "--out", out, "--tasks", 2, *SMALL]
    run("train", "--task", "instructions", *words)
    said = capsys.readouterr().out
    assert "task3_few is left out: it has only 120 instances" in said and "task4_long is left out: its inputs have 202 words" in said
    record = json.loads((out / "record.json").read_text())
    assert list(record["metrics"]) == ["teacher", "before", "after", "after_pool", "token_ratio"]
    assert record["files"] == {f"{name}.json": hashlib.sha256((collection / f"{name}.json").read_bytes()).hexdigest()
                               for name in ("task1_a", "task2_b")}
    assert "| **student after**, inputs from a pool |" in said and "| task | teacher | before | after | after, pool | tokens ÷ |" in said
    for name in ("student", "student_pool"):
        student = load(out / "task1_a" / name)[0]
        assert len(student.config.more_eos_token_ids) == 2
    run("eval", "--task", "instructions", "--model", out / "task1_a" / "student", "--ask", "is a b", "--device", "cpu")
    student, base = capsys.readouterr().out.rstrip("\n").split("\n")
    assert str(out / "task1_a" / "student") in student and base.startswith("its base")


@pytest.mark.parametrize("task, more", [("explanations", ["--tasks", 3]), ("task_ids", ["--chosen", "task1,task2"])])
def test_the_other_hypotheses_run_too(task, more, folder, collection, run, tmp_path):
    (collection / "task9_training.json").rename(collection / "task5_not_here.json")
    out = tmp_path / "run"
    run("train", "--task", task, "--scale", "smollm2", "--model", folder, "--data", collection, "--out", out, *SMALL, *more)
    record = json.loads((out / "record.json").read_text())
    assert record["scale"] == "smollm2" and {"task1_a.json", "task2_b.json"} <= set(record["files"])


def test_what_is_missing_is_named(folder, run, tmp_path, monkeypatch):
    from minicd.tasks import settings
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "smollm2.py").touch()
    monkeypatch.chdir(tmp_path)
    words = ["--task", "instructions", "--scale", "smollm2", "--out", tmp_path / "run"]
    with pytest.raises(SystemExit, match="holds no task file .* github.com/allenai/natural-instructions.*--data"):
        run("train", *words)
    write_task(tmp_path / "tasks", "task1_a")
    with pytest.raises(SystemExit, match="smollm2 is not here yet; this makes it: python .*data/smollm2.py"):
        run("train", *words, "--tasks", 1, "--data", tmp_path / "tasks", "--jobs", 1)


@pytest.mark.smollm2
@pytest.mark.skipif(not REAL.exists(), reason="Natural Instructions are not here (shared/data)")
def test_the_real_model_writes_inputs_and_answers():
    model, tokenizer = load(SMOLLM2)
    end_with_line(model, tokenizer)
    task = load_task(REAL / "tasks" / "task1622_disfl_qa_text_modication.json")
    texts = few_shot_inputs(model, tokenizer, [example.input for example in task.positives], 3, 60)(4, np.random.default_rng(0))
    assert len(texts) == 4 and not any("\n" in text for text in texts)
    [answer] = generate(model, tokenizer.encode_all(["Input: 2 + 2\nOutput: 4\nInput: 1 + 2\nOutput:"]), 10, temperature=0)
    assert tokenizer.decode(answer).strip() == "3"
