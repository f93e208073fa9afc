"""The three experiments on instructions: their parts by hand, and each command end to end in very small, pocket and real data."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_t5

from bench.trials import that_stops
from data.world.instructions import world_item, world_tokenizer
from minicd import metrics
from minicd.hf.checkpoint import save
from minicd.hf.tokenizers import read_tokenizer
from minicd.t5 import T5, T5Config, initialise
from minicd.tasks.explanations import Explanations, ExplanationSettings
from minicd.tasks.folder import RunFolder
from minicd.tasks.instructions import Instructions, chosen_tasks
from minicd.tasks.parts import inputs
from minicd.tasks.parts.inputs import derangement, few_shot_inputs, pool
from minicd.tasks.parts.instruction_eval import TEST
from minicd.tasks.parts.instruction_tasks import untested
from minicd.tasks.parts.natural_instructions import Instance, NITask
from minicd.tasks.record import make_record, spread
from minicd.tasks.report import made_by, minutes_line
from minicd.tasks.settings import guarded
from minicd.tasks.task_ids import TaskIds
from minicd.tokenizer import word_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
POCKET_TASKS = ROOT / "data" / "instructions" / "test"
BASE = ROOT / "data" / "pocket-instructions"
SMALL = ["--practice-inputs", "12", "--epochs", "1", "--batch-size", "4", "--label-samples", "5", "--test-instances", "3", "--device", "cpu",
         "--max-new-tokens", "5", "--jobs", "1", "--precision", "fp32"]
REAL = "task1393,task242,task066,task828"


@pytest.fixture(scope="module")
def pocket_model(tmp_path_factory) -> Path:
    """A random T5 with the words of the pocket world."""
    folder, tokenizer = tmp_path_factory.mktemp("pocket"), world_tokenizer()
    save(that_stops(tiny_t5(len(tokenizer))), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def real_model(tmp_path_factory) -> Path:
    """A small random T5 with the real T5 tokenizer."""
    path = SHARED / "tokenizers" / "t5" / "tokenizer.json"
    if not path.exists() or not (SHARED / "natural_instructions").exists():
        pytest.skip("the real T5 tokenizer and Natural Instructions are not here (shared/data)")
    model = initialise(T5(T5Config(vocab_size=32128, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1, dropout_rate=0.0,
                                   feed_forward_proj="gated-gelu", tie_word_embeddings=False)), seed=0)
    folder = tmp_path_factory.mktemp("real")
    save(that_stops(model), read_tokenizer(path), folder)
    return folder


def links(folder: Path, source: Path, beginnings: str) -> Path:
    """A folder with only the task files that begin so."""
    folder.mkdir()
    for beginning in beginnings.split(","):
        (path,) = source.glob(f"{beginning}*.json")
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture
def train(monkeypatch):
    def run(task: str, *words) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", "--task", task, *SMALL, *map(str, words)])
        guarded(importlib.import_module("train").main)
    return run


def refused(train, task: str, *words) -> str:
    with pytest.raises(SystemExit) as stopped:
        train(task, *words)
    assert isinstance(stopped.value.code, str) and len(stopped.value.code.splitlines()) == 1
    return stopped.value.code


def task(name: str) -> NITask:
    return NITask(name, "do it", [], [], [Instance("1", "a", ["b"])], ["Kind"])


def test_what_is_tested_is_not_practised_where_a_file_repeats_itself():
    """Under another id; case, spaces and punctuation do not make another input."""
    texts = [f"input {i}" for i in range(TEST)] + ["input 7", "Input  8!", "input seven", "input seven"]
    repeating = replace(task("t"), instances=[Instance(str(i), text, ["b"]) for i, text in enumerate(texts)])
    assert untested(repeating) == ["input seven"] * 2


def test_half_of_the_tasks_are_those_that_explanations_help_most():
    tasks, margins = [task(name) for name in "abcdef"], [3.0, 40.0, -9.0, 0.5, 20.0, -1.0]
    assert [t.name for t in chosen_tasks(tasks, margins, 4)] == ["b", "e", "d", "f"]
    assert [t.name for t in chosen_tasks(tasks, margins, 3)] == ["b", "d", "f"]


def test_a_pool_is_drawn_from_with_repeats_and_by_seed():
    draw = pool(["a", "b", "c"])
    first, again = (draw(50, np.random.default_rng(1)) for _ in range(2))
    assert first == again and set(first) == {"a", "b", "c"}


def test_a_model_is_asked_until_nine_tenths_are_of_no_use(monkeypatch):
    """A few missing ones after many rounds are no reason to end a run."""
    tokenizer, asked = word_tokenizer(["Input:", *"abc"]), []
    model = tiny_t5(len(tokenizer))

    def generate(model, prompts, *args, **more):
        asked.append(len(prompts))
        good = 5 if len(asked) == 1 else 0 if len(asked) < 8 else 20  # most are not finished
        return [tokenizer.encode("a b")] * len(prompts), ["eos"] * good + ["length"] * (len(prompts) - good)
    monkeypatch.setattr(inputs, "generate", generate)
    assert len(few_shot_inputs(model, tokenizer, ["a"], 1, 4)(20, np.random.default_rng(0))) == 20
    assert asked == [20] * 8
    monkeypatch.setattr(inputs, "generate", lambda model, prompts, *args, **more: (
        asked.append(len(prompts)) or ([[]] * len(prompts), ["length"] * len(prompts))))
    asked.clear()
    with pytest.raises(ValueError, match="asked for 20 inputs, the model wrote only 0"):
        few_shot_inputs(model, tokenizer, ["a"], 1, 4)(20, np.random.default_rng(0))
    assert asked == [20] * 10


def test_few_shot_inputs_come_from_the_model_and_are_never_test_inputs():
    tokenizer = word_tokenizer(["Input:", *"abcdefghijklmnop"])
    model = that_stops(tiny_t5(len(tokenizer), initializer_factor=1.0), share=0.35)
    draw = few_shot_inputs(model, tokenizer, ["a b", "c d", "b"], 2, 8)
    texts = draw(200, np.random.default_rng(0))
    assert texts == draw(200, np.random.default_rng(0)) and len(texts) == 200 and all(texts) and len(set(texts)) > 5
    forbidden = {texts[0], texts[1]}
    allowed = few_shot_inputs(model, tokenizer, ["a b", "c d", "b"], 2, 8, forbidden)(200, np.random.default_rng(0))
    assert len(allowed) == 200 and not forbidden & set(allowed)
    with pytest.raises(ValueError, match="asked for 50 inputs, the model wrote only 0 that can be used"):
        few_shot_inputs(model, tokenizer, ["a"], 2, 2, forbidden=Everything())(50, np.random.default_rng(0))


class Everything(set):
    def __contains__(self, item) -> bool:
        return True


def test_correlation_by_hand():
    # x − mean = (−1, 0, 1), y − mean = (−2, 1, 1): r = 3 / √(2 · 6) = 0.8660; of the 6 pairings 2 have an r as large
    r, p = metrics.correlation([(1, 1), (2, 4), (3, 4)])
    assert r == pytest.approx(0.866025, abs=1e-6) and p == pytest.approx(2 / 6, abs=0.01)
    assert metrics.correlation([(1, 2), (1, 3), (1, 4)]) == (0.0, 1.0)
    line = [(float(i), 2.0 * i) for i in range(12)]
    assert metrics.correlation(line) == (pytest.approx(1.0), pytest.approx(1e-5, abs=1e-5))
    assert metrics.correlation([(x, -y) for x, y in line])[1] > 0.99


def test_margins_are_differences_to_the_student_before(tmp_path):
    """Averaged over the seeds; their correlation is that of the averages, beside those of each seed."""
    seeds = [{"t": {"teacher": 50.0, "before": 20.0, "after": 40.0}, "u": {"teacher": 9.0, "before": 1.0, "after": 2.0},
              "v": {"teacher": 5.0, "before": 5.0, "after": 5.0}}, {"t": {"teacher": 60.0, "before": 20.0, "after": 30.0},
              "u": {"teacher": 5.0, "before": 1.0, "after": 2.0}, "v": {"teacher": 5.0, "before": 5.0, "after": 5.0}}]
    settings, figures = ExplanationSettings(tasks=3), []
    for seed, scores in enumerate(seeds):
        folder = RunFolder(tmp_path / str(seed), torch.device("cpu"))
        for name, score in scores.items():
            folder.keep(f"score-{name}", score, None)
        experiment = Explanations(settings, seed, folder)
        experiment.chosen = [task(name) for name in scores]
        figures.append(experiment.figures())
    record = Explanations.complete(make_record("explanations", settings, [0, 1], figures, [{}, {}], {}))
    assert record["points"] == {"t": [35.0, 15.0], "u": [6.0, 1.0], "v": [0.0, 0.0]}
    assert record["mean_margins"]["share_kept"] == round(16 / 41, 3) and record["mean_margins"]["without_largest"] == 1.0
    assert record["mean_margins"]["correlation"] == pytest.approx(metrics.correlation([(35, 15), (6, 1), (0, 0)])[0], abs=1e-3)
    assert record["metrics"]["correlation"]["values"][0] == pytest.approx(metrics.correlation([(30, 20), (8, 1), (0, 0)])[0], abs=0.01)


def test_association_by_hand():
    right, wrong = metrics.association([[90, 10, 20], [30, 80, 40], [0, 0, 70]])
    assert right.tolist() == [90, 80, 70] and wrong.tolist() == [15, 35, 0]
    for table in ([[1.0]], [[1, 2, 3], [4, 5, 6]], [1, 2]):
        with pytest.raises(ValueError, match="a square table of two tasks or more"):
            metrics.association(table)


@pytest.mark.parametrize("seed", range(20))
def test_no_task_keeps_its_number(seed):
    order = derangement(4, np.random.default_rng(seed))
    assert sorted(order) == [0, 1, 2, 3] and all(i != number for i, number in enumerate(order))
    assert order == derangement(4, np.random.default_rng(seed))


def test_training_text_begins_without_examples():
    import random
    early, late = ([world_item(random.Random(i), done)[0] for i in range(60)] for done in (0.0, 0.9))
    assert not any("Example" in prompt for prompt in early) and sum("Example 2" in prompt for prompt in late) > 15


@pytest.mark.parametrize("name, more", [("instructions", ["--tasks", 2]), ("explanations", ["--tasks", 3]), ("task_ids", [])])
def test_the_experiments_run_on_pocket_data_and_resume(name, more, pocket_model, train, tmp_path, capsys):
    tasks = links(tmp_path / "tasks", POCKET_TASKS, "task501,task502,task503,task504,task516,task517")
    words = ["--model", pocket_model, "--data", tasks, "--out", tmp_path / "run", *more]
    train(name, *words)
    output = capsys.readouterr().out
    assert "One practice item" in output and "Definition:" in output
    result = json.loads((tmp_path / "run" / "record.json").read_text())
    assert result["task"] == name and result["scale"] == "pocket" and result["minutes"]["total"][0] >= 0
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    train(name, *words)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == stamps
    again = json.loads((tmp_path / "run" / "record.json").read_text())
    assert again["metrics"] == result["metrics"]


def test_a_recursive_student_that_was_interrupted_goes_on(pocket_model, train, tmp_path):
    """It has copied the first round by then."""
    train("task_ids", "--model", pocket_model, "--out", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("mixed_recursive*.json")}
    weights = tmp_path / "mixed_recursive" / "student-2" / "model.safetensors"
    student = weights.read_bytes()
    for path in (weights, tmp_path / "mixed_recursive" / "round-1" / "student.safetensors", *tmp_path.glob("mixed_recursive*.json")):
        path.unlink()
    train("task_ids", "--model", pocket_model, "--out", tmp_path)
    assert weights.read_bytes() == student
    assert {path.name: path.read_bytes() for path in tmp_path.glob("mixed_recursive*.json")} == before


@pytest.mark.parametrize("other", ["mixed/round-0/student.safetensors", "naive/round-1/student.safetensors"])
def test_the_student_of_another_round_is_not_taken(other, pocket_model, train, tmp_path):
    """Its file is whole, but says where it belongs."""
    train("task_ids", "--model", pocket_model, "--out", tmp_path)
    path = tmp_path / "naive" / "round-0" / "student.safetensors"
    path.write_bytes((tmp_path / other).read_bytes())
    (tmp_path / "naive" / "student-2" / "model.safetensors").unlink()
    said = refused(train, "task_ids", "--model", pocket_model, "--out", tmp_path)
    assert f"{path} is damaged or another model's (it is {other} of TaskIds, seed 0); delete it to train anew" in said


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """What eval.py --task instructions prints."""
    def run(*words) -> str:
        monkeypatch.setattr(sys, "argv", ["eval.py", "--task", "instructions", "--device", "cpu", "--precision", "fp32",
                                          *map(str, words)])
        capsys.readouterr()
        guarded(importlib.import_module("eval").main)
        return capsys.readouterr().out
    return run


def test_the_base_follows_instructions_and_does_nothing_without(evaluate):
    """A hundred instances of the evaluation tasks; README's figures are of all that it names."""
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 10e6
    mean = evaluate("--model", BASE, "--data", POCKET_TASKS, "--test-instances", 3).splitlines()[-1]
    full, without, bare = (float(value.split()[-1]) for value in mean.split(", "))
    assert full > 80 and without < full and bare < 25, mean


def test_the_base_reads_the_instruction_that_it_is_given(evaluate):
    lines = "Definition: {} .\n\nNow complete the following example -\nInput: dog apple 3 red\nOutput:"
    for rule, answer in (("write the list backwards", "red 3 apple dog"), ("please name the last item", "red"),
                         ("keep only the fruits", "apple"), ("remove the fruits", "dog 3 red"), ("count the fruits", "1")):
        assert evaluate("--model", BASE, "--ask", lines.format(rule)).strip() == answer


def test_a_finished_student_is_evaluated_and_asked(train, evaluate, tmp_path):
    """eval.py gives the figures of the record, from the folder that training leaves."""
    tasks, out = links(tmp_path / "tasks", POCKET_TASKS, "task501,task516"), tmp_path / "run"
    train("instructions", "--model", BASE, "--data", tasks, "--out", out, "--tasks", 2, "--epochs", 40, "--lr", 1e-3)
    record = json.loads((out / "record.json").read_text())
    for name, figures in record["by_task"].items():
        path, (data,) = out / name / "student", POCKET_TASKS.glob(f"{name}.json")
        words = ["--data", data, "--test-instances", 3, "--max-new-tokens", 5]
        assert f"bare {figures['after']:.1f}" in evaluate("--model", path, *words).splitlines()[0]
        teacher, mean = evaluate("--model", BASE, *words).splitlines()
        assert teacher.startswith(name) and f"full {figures['teacher']:.1f}" in teacher and mean.startswith("mean")
    assert record["metrics"]["teacher"]["mean"] > 50 and record["metrics"]["after"]["mean"] > 10
    student, base = evaluate("--model", path, "--ask", "dog cat").splitlines()
    assert set(student.split("  ")[-1].split()) <= set(world_tokenizer().backend.get_vocab()) and base.startswith("its base")
    with pytest.raises(SystemExit, match="nowhere holds no task file"):
        evaluate("--model", path, "--data", "nowhere")


@pytest.mark.parametrize("name, more", [("instructions", ["--tasks", 2]), ("explanations", ["--tasks", 3]),
                                        ("task_ids", ["--chosen", REAL])])
def test_the_experiments_run_on_real_data(name, more, real_model, train, tmp_path):
    tasks = links(tmp_path / "tasks", SHARED / "natural_instructions" / "tasks", REAL)
    train(name, "--scale", "paper", "--model", real_model, "--data", tasks, "--out", tmp_path / "run", *more)
    result = json.loads((tmp_path / "run" / "record.json").read_text())
    assert result["scale"] == "paper" and result["settings"]["lr"] == 1e-5 and result["settings"]["optimiser"] == "adamw"


@pytest.mark.parametrize("name, words, message", [
    ("instructions", ["--tasks", "99"], "99 tasks are asked for, but there are only 36"),
    ("explanations", ["--tasks", "2"], "--tasks 2: it must be at least 3"),
    ("explanations", ["--tasks", "99"], "99 tasks are asked for, but there are only 36"),
    ("task_ids", ["--chosen", "task501,task9"], "0 task files begin with 'task9'"),
    ("task_ids", ["--chosen", "task50"], "9 task files begin with 'task50'"),
    ("task_ids", ["--chosen", "task501"], "needs two different tasks or more"),
    ("instructions", ["--data", "nowhere"], "nowhere holds no task file"),
    ("instructions", ["--model", "nowhere"], "nowhere is not a folder with a model")])
def test_what_cannot_be_run_is_named(name, words, message, pocket_model, train, tmp_path):
    assert message in refused(train, name, "--model", pocket_model, "--out", tmp_path, *words)
    assert not list(tmp_path.rglob("margins.json"))  # before anything is computed


def test_reports():
    """The tables name every row, with a figure beside the paper's."""
    figures = dict.fromkeys(Instructions.PAPER, 12.34)
    record = {"seeds": [0, 1], "scale": "pocket", "by_task": {"t1": figures, "t2": figures}, "paper": Instructions.PAPER,
              "settings": {"tasks": 2}, "metrics": {name: spread([10.0, 20.0]) for name in Instructions.PAPER}}
    table = Instructions.table(record)
    assert "Rouge-L, mean of 2 tasks, 2 seeds" in table
    assert "mean of 1 tasks a seed, 2 in all, 2 seeds" in Instructions.table(record | {"settings": {"tasks": 1}})
    assert "| **student after** | 15.0 ± 7.1 | 34.7 |" in table and "| t1 | 12.3 | 12.3 | 12.3 | 12.3 |" in table
    only = {name.replace("after", "after_pool"): value for name, value in record["metrics"].items()}
    assert Instructions.headline(record | {"metrics": only}).startswith("Rouge-L 15.0 ± 7.1 on the bare input")
    record = {"seeds": [0], "scale": "pocket", "points": {"t": (1.0, 2.0)}, "metrics": {"correlation": spread([0.5])},
              "mean_margins": {"correlation": 0.5, "p_value": 0.01, "without_largest": -0.25}}
    table = Explanations.table(record)
    assert Explanations.headline(record).endswith("1 tasks: r = 0.50, without the largest -0.25")
    record["mean_margins"]["without_largest"] = 0.49  # nothing hangs on one task
    assert Explanations.headline(record).endswith("1 tasks: r = 0.50")
    assert "r = 0.50, p ≤ 0.01" in table and "without the largest margin r = -0.25" in table and "| t | 1.0 | 2.0 |" in table
    names = ["teacher", "before_correct", "before_wrong"] + [f"{v}_{w}_{i}" for v in ("naive", "mixed", "mixed_recursive")
                                                            for w in ("correct", "wrong") for i in (1, 2)]
    table = TaskIds.table({"seeds": [0], "scale": "pocket", "paper": TaskIds.PAPER, "metrics": {n: spread([50.0]) for n in names},
                           "by_task": {n: {"a": 1.0, "b": 2.0} for n in names}})
    assert "| mixed, round 1 | 50.0 | 50.0 | 69 | 15 |" in table and "| mixed, round 2 | 50.0 | 50.0 | 70 | 16 |" in table and "| naive, round 2 | 1 / 1 | 2 / 2 |" in table


def test_minutes_of_all_tasks_are_one_stage():
    minutes = {"total": [1.0, 2.0], "margins": [0.14, 0.1], "score-a": [0.2, 0.4], "score-b-c": [0.3, 0.5], "short": [0.01, 0.02]}
    assert minutes_line({"minutes": minutes}) == "minutes a seed: all stages 1.0/2.0, margins 0.1/0.1, score 0.5/0.9"


def test_the_readme_has_a_table_as_soon_as_there_is_a_real_model():
    def record(scale: str) -> dict:
        return {"scale": scale, "seeds": [0], "metrics": {"after": {"mean": 30.0, "std": None}}, "paper": Instructions.PAPER,
                "minutes": {"total": [9.0]}, "command": "python train.py", "hardware": "a machine", "commit": "abc"}
    assert Instructions.front([record("pocket")]) == ""
    text = Instructions.front([record("smollm2"), record("pocket")])
    assert "| **student after** | 34.7 | 30.0 | 30.0 |" in text and "after**, inputs from a pool" not in text


@pytest.mark.parametrize("hardware, named", [
    ("Intel(R) Xeon(R) Processor, 1 threads", "Intel Xeon, 1 thread"), ("AMD EPYC, 11 threads", "AMD EPYC, 11 threads"),
    ("AMD EPYC, 2 threads; NVIDIA H200; AMD EPYC, 1 threads", "AMD EPYC; NVIDIA H200")])
def test_machines_are_named_once_and_shortly(hardware, named):
    record = {"command": "a", "seeds": [0, 1], "hardware": hardware}
    assert made_by(record) == f"2 seeds by `a` on {named}"
