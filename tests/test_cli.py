"""The command line as a user meets it: a whole small run, resuming after kill -9, and one sentence for every mistake."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from data.world.lists import pocket_tokenizer
from minicd.hf.checkpoint import load, save
from minicd.labels import Examples
from minicd.sampling import generate, score
from minicd.t5 import T5, T5Config, initialise
from minicd.tasks import addition
from minicd.tasks.parts import addition_questions
from minicd.tasks.report import made_by
from minicd.tasks.run import Experiment
from minicd.tasks.settings import guarded, range_of
from minicd.training import Epochs, FitSettings, Run, fit

ROOT = Path(__file__).resolve().parent.parent
MODELS = ["teacher", "student", "scratchpad_then_direct", "scratchpad_and_direct"]
SMALL = {"max-digits": 3, "train-questions": 64, "teacher-epochs": 5, "teacher-batch": 16, "teacher-lr": 5e-3, "direct-epochs": 5,
         "practice-questions": 300, "label-samples": 5, "student-epochs": 2, "student-batch": 32, "test-questions": 100,
         "floor": 0.0, "optimiser": "adamw", "precision": "fp32", "jobs": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny T5 that has seen enough scratchpads of both kinds to put digits between two #: practice finds answers to most
    questions, whatever the teacher learns besides, and on every processor. It cannot add."""
    tokenizer = pocket_tokenizer()
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=48, num_heads=2, num_layers=1,
                      feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0)
    model = initialise(T5(config), seed=0)
    questions = addition_questions.draw_questions(200, 3, "train", np.random.default_rng(9))
    examples = Examples.join([addition.scratchpad_examples(questions[::2], tokenizer, "compact"),
                              addition.scratchpad_examples(questions[1::2], tokenizer, "nye")])
    fit(model, Epochs(examples, 20, 30, seed=0), FitSettings(lr=1e-2, decay=0.3, loss="hard", precision="fp32"))
    folder = tmp_path_factory.mktemp("base") / "model"
    save(model, tokenizer, folder)
    return folder


def flags(base: Path, out: Path, **changes) -> list[str]:
    """The words after `python train.py`; a change to None leaves a flag out, True gives it without a value."""
    settings = {**SMALL, **{name.replace("_", "-"): value for name, value in changes.items()}}
    words = ["--task", "addition", "--device", "cpu", "--model", str(base), "--out", str(out)]
    for name, value in settings.items():
        words += [] if value is None else [f"--{name}"] if value is True else [f"--{name}", *str(value).split()]
    return words


@pytest.fixture
def cli(monkeypatch):
    """Run a program's main() in this process, guarded as in the real one. What would be a traceback there raises here."""
    def run(program: str, *words) -> None:
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *map(str, words)])
        guarded(importlib.import_module(program).main)
    return run


@pytest.fixture
def refused(cli):
    """Run what must fail: one sentence, and an exit code that is not 0. Returns the sentence."""
    def run(program: str, *words) -> str:
        with pytest.raises(SystemExit) as stopped:
            cli(program, *words)
        assert isinstance(stopped.value.code, str), "an exit code of 0, or a failure without a sentence"
        assert len(stopped.value.code.splitlines()) == 1
        return stopped.value.code
    return run


STARTED: list[subprocess.Popen] = []
PATIENCE = 600  # seconds; far more than anything here takes, for a busy machine


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    for process in STARTED:
        if process.poll() is None:
            process.kill()
            process.communicate()
    STARTED.clear()


def start(*words, threads: int = 1) -> subprocess.Popen:
    """The real command as if in a terminal of its own, whose signals can be sent to it."""
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": str(threads)}, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    STARTED.append(process)
    return process


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> tuple[Path, str]:
    """A finished run of two seeds by the real command: its folder and what it printed."""
    out = tmp_path_factory.mktemp("run") / "two-seeds"
    process = start("train.py", *flags(base, out, seeds="0 1", all_rows=True, scratchpad="nye"))
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    return out, printed


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_a_run_says_what_it_does(finished):
    out, printed = finished
    unusual = re.search("^differs from the defaults: (.*)$", printed, re.MULTILINE)[1]
    for words in ("--max-digits 3", "--train-questions 64", "--scratchpad nye", "--floor 0.0", "--all-rows"):
        assert words in unusual
    assert "--label-top" not in unusual and f"seeds 0 1, in {out}, on cpu, 1 stage at a time" in printed
    assert re.search(r"teacher: \d+\.\d % of 500 validation questions", printed)
    item = re.search(r"One practice item\n  teacher prompt    add step by step : ([\d +]+)\n  completion        .*\n"
                     r"  extracted answer  .*\n  student prompt    add : ([\d +]+)\n(?:  its first label   (.*)\n)?", printed)
    assert item and item[1] == item[2]
    if item[3]:  # the item has an answer: the likeliest tokens of its label
        assert 0.97 < sum(float(n) for n in re.findall(r" (\d\.\d\d)", item[3])) < 1.03
    assert printed.count("One practice item") == 2  # one for each seed
    assert "additions of up to 3 digits, %, 2 seeds, pocket scale" in printed
    for row in ("teacher, step by step", "student before", r"\*\*student after\*\*", "scratchpad → direct", r"scratchpad \+ direct",
                "student after, hard labels", "student on as many true answers"):
        assert re.search(rf"^\| {row} \| \d+\.\d ± \d+\.\d \| \d* ?\|$", printed, re.MULTILINE), row
    assert re.search(r"^\| tokens at inference, teacher ÷ student \| \d+\.\d ± \d+\.\d \| 8.0 \|$", printed, re.MULTILINE)
    assert "| by digits | 1 | 2 | 3 |" in printed and "| by carry run | 0 |" in printed
    assert re.search(r"\d+\.\d minutes from start to end; minutes a seed: all stages \d+\.\d/\d+\.\d", printed)


def test_a_run_writes_models_practice_set_and_record(finished):
    out, _ = finished
    for folder in (out, out / "seed-1"):
        for name in [*MODELS, "student_hard", "student_true"]:
            model, tokenizer = load(folder / name)
            assert sum(p.numel() for p in model.parameters()) > 0 and len(tokenizer) == len(pocket_tokenizer())
        items = Examples.load(folder / "practice.safetensors")
        assert 100 <= len(items) <= 300
        left_over = [path.name for path in folder.iterdir() if "progress" in path.name or "parts" in path.name or "tmp" in path.name]
        assert left_over == []
    first, second = (load_file(folder / "teacher" / "model.safetensors") for folder in (out, out / "seed-1"))
    assert not torch.equal(first["shared.weight"], second["shared.weight"])


def practice_figures(path: Path, asked: int) -> tuple[float, float]:
    """Percent of the practised answers that are true, and of the questions that were dropped, counted anew."""
    items, tokenizer = Examples.load(path), pocket_tokenizer()
    questions = [tokenizer.decode(items.prompts[i]).removeprefix("add : ").replace(" ", "") for i in range(len(items))]
    answers = [tokenizer.decode(items.answers[i]).replace(" ", "") for i in range(len(items))]
    true = sum(str(sum(map(int, q.split("+")))) == a for q, a in zip(questions, answers))
    return 100 * true / len(items), 100 * (asked - len(items)) / asked


def test_the_record_is_complete(finished):
    record = read(finished[0] / "record.json")
    assert {"task", "scale", "command", "commit", "hardware", "torch", "seeds", "minutes", "settings", "metrics", "paper"} <= set(record)
    assert (record["task"], record["scale"], record["seeds"], record["torch"]) == ("addition", "pocket", [0, 1], torch.__version__)
    assert record["command"].startswith("python train.py --task addition --device cpu --model ")
    assert re.fullmatch(r"([0-9a-f]{12}\+?)?", record["commit"]) and "threads" in record["hardware"]
    assert len(record["minutes"]["total"]) == 2 and set(MODELS) | {"practice", "test_after"} <= set(record["minutes"])
    for name, value in SMALL.items():
        assert name == "jobs" or record["settings"][name.replace("-", "_")] == value
    assert record["paper"] == {"teacher": 93, "before": 0, "after": 95, "scratchpad_then_direct": 72, "scratchpad_and_direct": 61,
                               "token_ratio": 8.0}
    assert set(record["metrics"]) == {*record["paper"], "after_hard", "true_answers", "practice_true", "practice_dropped"}
    for name, metric in record["metrics"].items():
        a, b = metric["values"]
        assert metric["mean"] == pytest.approx((a + b) / 2, abs=0.01), name
        assert metric["std"] == pytest.approx(abs(a - b) / 2**0.5, abs=0.01), name
        assert name == "token_ratio" or 0 <= min(a, b) <= max(a, b) <= 100
    for i, folder in enumerate((finished[0], finished[0] / "seed-1")):
        true, dropped = practice_figures(folder / "practice.safetensors", asked=300)
        assert record["metrics"]["practice_true"]["values"][i] == pytest.approx(true, abs=0.01)
        assert record["metrics"]["practice_dropped"]["values"][i] == pytest.approx(dropped, abs=0.01)
    assert record["metrics"]["token_ratio"]["mean"] > 2  # a scratchpad is longer than an answer
    assert set(record["by_digits"]["teacher"]) == {"1", "2", "3"}


def model_bytes(out: Path) -> dict[str, bytes]:
    return {name: (out / name / "model.safetensors").read_bytes() for name in MODELS}


def test_the_same_command_again_makes_nothing(finished, base, cli, capsys, monkeypatch):
    out, _ = finished
    record, models = read(out / "record.json"), model_bytes(out)
    monkeypatch.setattr(Experiment, "make", None)
    cli("train", *flags(base, out, seeds="0 1", all_rows=True, scratchpad="nye"))
    again = read(out / "record.json")
    assert again["minutes"].pop("wall") >= record["minutes"].pop("wall")
    for part in ("metrics", "minutes", "by_digits", "by_carry_run", "settings", "seeds"):
        assert again[part] == record[part], part
    assert model_bytes(out) == models
    assert "2 seeds" in capsys.readouterr().out


def notes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "notes").iterdir()}


def test_settings_that_change_no_stage_may_change(finished, base, cli, refused, capsys):
    """Fewer rows, another floor, one seed of the two: nothing is trained anew."""
    out, _ = finished
    models, before = model_bytes(out), notes(out)
    record = (out / "record.json").read_bytes()
    assert "below the floor of 100.0 %" in refused("train", *flags(base, out, scratchpad="nye", floor=100.0))
    cli("train", *flags(base, out, scratchpad="nye", save_every=7.0))
    assert "1 seed, pocket scale" in capsys.readouterr().out
    single = read(out / "record.json")
    assert "true_answers" not in single["metrics"] and single["metrics"]["after"]["std"] is None
    assert single["metrics"]["after"]["values"] == json.loads(record)["metrics"]["after"]["values"][:1]
    assert model_bytes(out) == models and notes(out) == before
    (out / "record.json").write_bytes(record)


def test_other_settings_in_the_same_folder_are_refused(finished, base, refused):
    out, _ = finished
    models = model_bytes(out)
    said = refused("train", *flags(base, out, scratchpad="nye", seeds="0 1", student_lr=0.5, label_samples=6))
    assert f"{out} holds a run with other settings" in said and "choose another folder" in said
    assert "label_samples (there 5, now 6)" in said and "student_lr (there 0.002, now 0.5)" in said
    assert "max_digits" not in said and "scratchpad" not in said
    assert model_bytes(out) == models


# Runs that are interrupted, and one that is not: a checkpoint every 20 steps.
BROKEN = {"teacher_epochs": 12, "direct_epochs": 12, "practice_questions": 5000, "student_epochs": 1, "student_batch": 64,
          "label_samples": 3, "save_every": 0.0}


@pytest.fixture(scope="module")
def unbroken(base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *flags(base, out, **BROKEN)])
        importlib.import_module("train").main()
    return out


def written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def wait_for(path: Path, process: subprocess.Popen, after: int = 0) -> None:
    """Until the process has written the file, later than at the time `after`."""
    deadline = time.monotonic() + PATIENCE
    while written(path) <= after and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.003)
    if written(path) <= after:
        process.kill()
        raise AssertionError(f"{path.name} never came, or the run was over: {process.communicate()[1]}")


def interrupt(out: Path, done: Path, attempt: Callable[[], Any]) -> Any:
    """Interrupt a stage before it is done. A busy machine may be too late for that: then it tries again from the same files."""
    before = out.with_name("before")
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(out, before)
    for _ in range(5):
        result = attempt()
        if not done.exists():
            return result
        shutil.rmtree(out)
        shutil.copytree(before, out)
    raise AssertionError(f"{done} was there before the interruption, five times")


def kill_when(exists: Path, words: list[str]) -> None:
    """Start the run and kill -9 it as soon as the path is there."""
    process = start("train.py", *words)
    wait_for(exists, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def bars(errors: str, name: str) -> list[str]:
    """The states of a progress bar in what a run wrote to stderr."""
    return [line for line in re.split(r"[\r\n]", errors) if line.startswith(f"{name}:")]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Bit for bit, but for the times."""
    assert model_bytes(ours) == model_bytes(theirs)
    for name in ("practice.safetensors", "teacher_validation.json", "test_after.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    first, second = read(ours / "record.json"), read(theirs / "record.json")
    assert first["metrics"] == second["metrics"] and first["by_digits"] == second["by_digits"]
    files, others = ({path.name for path in out.iterdir() if not path.name.endswith(".tmp")} for out in (ours, theirs))
    assert files == others


def test_kill_9_in_every_stage_changes_nothing(base, unbroken, tmp_path, cli, capsys):
    """Killed while it trains the teacher, practises, trains the student and a baseline: the same files as an unbroken run."""
    out = tmp_path / "run"
    out.mkdir()
    words = flags(base, out, **BROKEN)
    stages = [(out / "teacher.progress.safetensors", out / "teacher" / "model.safetensors"),
              (out / "practice.parts" / "chunk-0000.safetensors", out / "practice.safetensors"),
              (out / "student.progress.safetensors", out / "student" / "model.safetensors"),
              (out / "scratchpad_then_direct.progress.safetensors", out / "scratchpad_then_direct" / "model.safetensors")]
    for begun, done in stages:
        interrupt(out, done, lambda: kill_when(begun, words))
    cli("train", *words)
    errors = capsys.readouterr().err
    first = bars(errors, "scratchpad_then_direct")[0]
    assert re.search(r" [1-9]\d?/48 ", first), f"the killed stage began anew: {first}"
    assert not bars(errors, "teacher") and not bars(errors, "practice 5000/5000") and not bars(errors, "student")
    assert_same_run(out, unbroken)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc here to find processes in")


def helpers_of(process: subprocess.Popen) -> list[int]:
    """The processes that work for a run with --jobs 2."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent, command = int((folder / "stat").read_text().rpartition(")")[2].split()[1]), (folder / "cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if parent == process.pid and b"spawn_main" in command:
            found.append(int(folder.name))
    return found


def assert_all_end(processes: list[int]) -> None:
    deadline = time.monotonic() + 20  # seconds; it takes less than one, but the machine may be busy
    while alive := [pid for pid in processes if is_alive(pid)]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def side_by_side(base, tmp_path):
    """Start a run with helpers of one thread each; return it and them when the teacher has a checkpoint, or at once."""
    out = tmp_path / "run"
    out.mkdir()

    def run(at_once: bool = False, **changes) -> tuple[subprocess.Popen, list[int]]:
        before = written(out / "teacher.progress.safetensors")
        process = start("train.py", *flags(base, out, **{**BROKEN, "jobs": 2, "until": "teacher", **changes}), threads=2)
        while at_once and process.poll() is None and not helpers_of(process):
            time.sleep(0.01)
        if not at_once:
            wait_for(out / "teacher.progress.safetensors", process, before)
        return process, helpers_of(process)
    return run


@needs_proc
def test_a_killed_helper_ends_the_run_and_changes_nothing(base, unbroken, side_by_side, tmp_path):
    def kill_helper() -> tuple[subprocess.Popen, list[int], str]:
        process, found = side_by_side()
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        return process, found, process.communicate(timeout=PATIENCE)[1]
    out = tmp_path / "run"
    process, found, errors = interrupt(out, out / "teacher" / "model.safetensors", kill_helper)
    said = re.findall("error: .*", errors)
    assert process.returncode == 1 and "Traceback" not in errors, errors
    assert len(said) == 1 and "a helper process was killed" in said[0] and "with --jobs 1 it needs less memory" in said[0]
    assert_all_end(found)

    again = start("train.py", *flags(base, out, **BROKEN, jobs=2), threads=2)
    printed, errors = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0 and "Traceback" not in errors and "2 stages at a time" in printed, errors
    assert_same_run(out, unbroken)


@needs_proc
@pytest.mark.parametrize("at_once", [True, False])
def test_ctrl_c_reaches_every_process_and_ends_in_a_sentence(side_by_side, tmp_path, at_once):
    """While the helper starts, and while it trains."""
    process, found = side_by_side(at_once, teacher_epochs=1000)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert found and process.returncode == 1 and "Traceback" not in errors, errors
    assert errors.endswith("\nstopped; the same command goes on from the last checkpoint\n")
    assert_all_end(found)
    if not at_once:
        assert read(tmp_path / "run" / "notes" / "teacher.json")["minutes"] > 0  # what was worked is noted


@needs_proc
def test_no_helper_outlives_a_killed_run(side_by_side):
    process, found = side_by_side(teacher_epochs=1000)
    process.kill()
    process.communicate()
    assert found
    assert_all_end(found)


@needs_proc
def test_a_second_start_in_one_folder_says_who_works_there(base, side_by_side, tmp_path, refused):
    """Also in the folder of one of its seeds; and kill -9 of the first leaves nothing that holds the folder."""
    out = tmp_path / "run"
    process, found = side_by_side(teacher_epochs=1000, seeds="0 1")
    before = sorted(path.name for path in out.iterdir() if "progress" not in path.name)
    for changes in ({"seeds": "0 1"}, {"seeds": "1"}, {"jobs": 2}):
        said = refused("train", *flags(base, out, **{**BROKEN, "until": "teacher", "teacher_epochs": 1000, **changes}))
        assert re.fullmatch(rf"error: process {process.pid} \(since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\) works in {out}; wait until "
                            "it is done, or choose another folder with --out", said), said
    assert f"works in {out / 'seed-1'};" in refused("train", *flags(base, out / "seed-1", teacher_epochs=1))
    assert sorted(path.name for path in out.iterdir() if "progress" not in path.name) == before
    process.kill()
    process.communicate()
    assert found and (out / ".lock").exists()
    refusal = refused("train", *flags(base, out, teacher_epochs=999))
    assert "holds a run with other settings" in refusal and not (out / ".lock").exists()


def test_a_run_can_stop_after_a_stage_and_go_on(base, tmp_path, cli, refused, capsys):
    """--until, then a damaged file at each stage; deleting what the sentence names mends it."""
    out = tmp_path / "run"
    cli("train", *flags(base, out, until="teacher"))
    assert "stopped after the stage teacher, as asked" in capsys.readouterr().out
    assert (out / "teacher" / "model.safetensors").exists() and not (out / "practice.safetensors").exists()

    progress = out / "student.progress.safetensors"
    progress.write_bytes(b"no tensors")
    assert f"{progress} is damaged" in refused("train", *flags(base, out))
    assert (out / "practice.safetensors").exists() and not (out / "student").exists()
    progress.unlink()

    cli("train", *flags(base, out, until="student"))
    assert "stopped after the stage student, as asked" in capsys.readouterr().out
    assert not (out / "record.json").exists() and not (out / "scratchpad_then_direct").exists()

    (out / "student").rename(tmp_path / "student")  # so that practice set and teacher are needed once more
    for name in ("practice.safetensors", "teacher/model.safetensors", "teacher_validation.json", "settings.json"):
        good = (out / name).read_bytes()
        for bad in (good[: len(good) // 2], b"", b"\xff\xfe\xff"):
            (out / name).write_bytes(bad)
            assert f"{out / name} is damaged" in refused("train", *flags(base, out, until="student"))
        (out / name).write_bytes(good)
    cli("train", *flags(base, out, until="student"))


def test_a_teacher_below_the_floor(base, tmp_path, refused, cli):
    said = refused("train", *flags(base, tmp_path, floor=100.0, teacher_epochs=1, until="practice"))
    assert re.search(r"the teacher solves \d+\.\d % of the validation questions, below the floor of 100.0 %", said)
    assert "--teacher-epochs" in said and "--floor" in said
    assert not (tmp_path / "practice.safetensors").exists()
    teacher = (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns
    cli("train", *flags(base, tmp_path, floor=0.0, teacher_epochs=1, until="practice"))  # the advice can be taken
    assert (tmp_path / "practice.safetensors").exists()
    assert (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns == teacher


def test_a_mistyped_model_does_not_claim_the_folder(base, tmp_path, refused, cli):
    out = tmp_path / "out"
    assert f"{tmp_path / 'nowhere'} is not a folder with a model" in refused("train", *flags(tmp_path / "nowhere", out))
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in refused("train", *flags(tmp_path / "empty", out))
    cli("train", *flags(base, out, teacher_epochs=1, until="teacher"))
    assert read(out / "settings.json")["model"] == str(base)


def test_a_folder_that_cannot_be_written(base, tmp_path, refused):
    (tmp_path / "file").write_text("a regular file")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        said = refused("train", *flags(base, out))
        assert f"cannot write to {out}" in said


@pytest.mark.parametrize("words, sentence", [
    (["--task", "adition"], "there is no task 'adition'; did you mean addition?; tasks: addition"),
    (["--task=pockett"], "there is no task 'pockett'; did you mean pocket?"),
    (["--task", "sorting"], "there is no task 'sorting'"),
    ([], "--task is missing; tasks: addition, instructions"),
    (["--task"], "argument --task: expected one argument"),
    (["--taks", "addition"], "unknown argument --taks; did you mean --task?"),
    (["--task", "addition", "--techer-epochs", "3"], "unknown argument --techer-epochs; did you mean --teacher-epochs?"),
    (["--task", "addition", "--label-sample=3"], "unknown argument --label-sample=3; did you mean --label-samples?"),
    (["--task", "addition", "--teacher-epochs", "many"], "argument --teacher-epochs: invalid"),
    (["--task", "addition", "--practice-questions", "0"], "--practice-questions 0: it must be at least 1"),
    (["--task", "addition", "--student-batch", "-4"], "--student-batch -4: it must be at least 1"),
    (["--task", "addition", "--scratchpad", "nya"], "argument --scratchpad: invalid choice"),
    (["--task", "addition", "--loss", "soft"], "argument --loss: invalid choice: 'soft'"),
    (["--task", "addition", "--until", "end"], "argument --until: invalid choice: 'end'"),
    (["--task", "addition", "--optimiser", "sgd"], "argument --optimiser: invalid choice: 'sgd'"),
    (["--task", "addition", "--scale", "huge"], "--scale huge: known scales are pocket, paper")])
def test_a_mistake_is_named_in_one_sentence(refused, words, sentence):
    assert sentence in refused("train", *words)


@pytest.mark.parametrize("changes, sentence", [({"max_digits": 19}, "--max-digits 19: it must be at least 3 and at most 18"),
                                               ({"max_digits": 2}, "--max-digits 2: it must be at least 3"),
                                               ({"train_questions": 10**6}, "1000000 different questions .* are too many"),
                                               ({"loss": "jsd", "jsd_beta": 1.0}, "--jsd-beta 1.0: it must be more than 0 and less than 1"),
                                               ({"loss": "reverse", "labels": "sampled"}, "'reverse' needs exact or top-k labels"),
                                               ({"on_policy": True}, "unknown argument --on-policy"),
                                               ({"seeds": "-1"}, "--seeds -1: it must be at least 0"),
                                               ({"teacher_lr": -1.0}, "--teacher-lr -1.0: it must be more than 0")])
def test_a_setting_that_cannot_be_is_named(base, tmp_path, refused, changes, sentence):
    assert re.search(sentence, refused("train", *flags(base, tmp_path / "out", **changes)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none(base, tmp_path, refused):
    out = tmp_path / "out"
    assert "--device cuda: this PyTorch sees no CUDA device" in refused("train", *flags(base, out), "--device", "cuda")
    assert "--device cuda" in refused("eval", "--model", base, "--device", "cuda")
    assert not out.exists()


def test_a_mistake_ends_the_real_command_without_a_traceback(tmp_path):
    """What the tests above see as an exception is, in the shell, a line on stderr and an exit code."""
    (tmp_path / "file").write_text("")
    processes = {"did you mean addition": start("train.py", "--task", "additon"),
                 "cannot write to": start("train.py", *flags(tmp_path, tmp_path / "file" / "below"))}
    for sentence, process in processes.items():
        printed, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1 and sentence in errors and "Traceback" not in errors
        assert len(errors.strip().splitlines()) == 1, errors


def test_help_lists_the_settings(cli, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli("train", "--task", "addition", "--help")
    said = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for field in addition.AdditionSettings.__dataclass_fields__.values():
        assert f"--{field.name.replace('_', '-')} " in said, field.name
        default = "" if field.default == "" or field.default is False else f"default: {field.default} {field.metadata['unit']}".strip()
        details = "; ".join(filter(None, [range_of(field.metadata), default]))
        assert f"{field.metadata['help']} {details and f'({details})'}".strip() in said.replace("- ", "-"), field.name
    for flag in ("--task", "--out", "--seeds", "--device", "--jobs", "--quick", "--publish"):
        assert flag in said
    with pytest.raises(SystemExit):
        cli("train", "--help")
    assert ", ".join(importlib.import_module("train").TASKS) in " ".join(capsys.readouterr().out.split())


def test_a_checkpoint_is_evaluated(finished, cli, capsys):
    """eval.py finds what the table of the run says, and the same questions step by step for the teacher."""
    out, _ = finished
    metrics = read(out / "record.json")["metrics"]
    for name, row, more in (("student", "after", ["--max-new-tokens", 10]),
                            ("teacher", "teacher", ["--step-by-step"])):  # as many tokens as in the run
        cli("eval", "--model", out / name, "--questions", 100, "--precision", "fp32", "--device", "cpu", *more)  # it knows the digits
        said = capsys.readouterr().out
        accuracy = re.search(r"exact match on 100 unseen questions of up to 3 digits: (\d+\.\d\d) %, \d+\.\d tokens a question", said)
        assert float(accuracy[1]) == metrics[row]["values"][0]
        assert "by digits: {'1': " in said and "by longest carry run: {'0': " in said


def test_a_model_that_practised_the_test_is_not_scored(finished, tmp_path, refused):
    copied = shutil.copytree(finished[0], tmp_path / "run")
    tested = addition_questions.test_questions(20, 3)
    addition.direct_examples(tested, pocket_tokenizer(), "compact").save(copied / "practice.safetensors")
    said = refused("eval", "--model", copied / "student", "--questions", 20, "--device", "cpu")
    assert said == (f"error: {copied / 'practice.safetensors'} holds test questions: the model has practised them, so its score "
                    "would mean nothing")


def test_a_finished_run_is_reused_for_another_loss(finished, base, tmp_path, cli, capsys):
    """Only the student is trained and tested; its figure stands beside that of the student with the other loss."""
    out = tmp_path / "hard"
    same = dict(scratchpad="nye", seeds="0 1", reuse=finished[0])
    cli("train", *flags(base, out, **same, loss="hard"))
    said, old, new = capsys.readouterr().out, read(finished[0] / "record.json"), read(out / "record.json")
    assert f"| student after, {finished[0]} | {old['metrics']['after']['mean']:.1f} ±" in said
    assert new["metrics"]["reused"] == old["metrics"]["after"] and new["metrics"]["teacher"] == old["metrics"]["teacher"]
    for name in ("teacher/model.safetensors", "practice.safetensors", "scratchpad_and_direct/model.safetensors"):
        assert (out / "seed-1" / name).read_bytes() == (finished[0] / "seed-1" / name).read_bytes()
    assert weights_of(out / "student") == weights_of(finished[0] / "student_hard")  # which --all-rows had trained


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_loss_that_needs_other_labels_practises_anew(finished, base, tmp_path, cli, capsys):
    out, lender = tmp_path / "exact", shutil.copytree(finished[0], tmp_path / "lender")
    command = flags(base, out, scratchpad="nye", reuse=lender, loss="exact", practice_questions=100)
    cli("train", *command)
    said = capsys.readouterr().out
    assert "practice is made anew: practice_questions 300 there, 100 here, labels 'sampled' there, 'exact' here" in said
    assert weights_of(out / "teacher") == weights_of(finished[0] / "teacher")
    assert Examples.load(out / "practice.safetensors").labels.kind == "exact"
    assert 0 <= read(out / "practice_figures.json")["practice_dropped"] <= 100
    shutil.rmtree(lender)
    cli("train", *command)  # all that it took is there
    assert f"{lender} is gone: what is finished here stays" in capsys.readouterr().out


@pytest.mark.parametrize("changes, sentence", [
    ({"max_digits": 4}, "its teacher has other settings: max_digits 3 there, 4 here"),
    ({"scratchpad": "compact"}, "scratchpad 'nye' there, 'compact' here"),
    ({"teacher_lr": 1e-3, "dropout": 0.5}, "teacher_lr 0.005 there, 0.001 here, dropout 0.1 there, 0.5 here")])
def test_a_run_with_another_teacher_is_not_reused(finished, base, tmp_path, refused, changes, sentence):
    settings = {"scratchpad": "nye", "reuse": finished[0], **changes}
    assert sentence in refused("train", *flags(base, tmp_path / "out", **settings))
    assert "is no run folder: it has no settings.json" in refused("train", *flags(base, tmp_path / "x", reuse=tmp_path))
    said = refused("train", *flags(base, tmp_path / "y", reuse=finished[0] / "seed-1", scratchpad="nye"))
    assert "it holds seed 1, not 0" in said


def test_too_many_test_questions_are_refused_before_anything_is_trained(base, tmp_path, refused):
    said = refused("train", *flags(base, tmp_path / "out", max_digits=3, test_questions=50_000))
    assert "50000 different questions of at most 3 digits are too many for the test split" in said
    assert not list(tmp_path.rglob("*.safetensors"))


def test_one_question_is_answered(finished, cli, refused, capsys, tmp_path):
    """Whatever this student, who has hardly practised, may say: it is its greedy completion of the student's prompt."""
    student = finished[0] / "student"
    cli("eval", "--model", student, "--ask", "123+456", "--device", "cpu", "--max-new-tokens", 9, "--precision", "fp32")
    model, tokenizer = load(student)
    completion = generate(model, [tokenizer.encode("add : 1 2 3 + 4 5 6")], 9, temperature=0, precision="fp32")[0]
    answer, base = capsys.readouterr().out.splitlines()
    assert answer.split("  ")[0].strip() == str(student) and answer.endswith("  " + tokenizer.decode(completion).replace(" ", ""))
    assert base.startswith("its base, ")
    cli("eval", "--model", finished[0], "--ask", "123+456", "--device", "cpu")  # the run: all its students, and the base
    assert {"seed-1/student", "student", "student_hard", "its"} <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    shutil.copytree(finished[0] / "seed-1", tmp_path / "run" / "seed-1")
    cli("eval", "--model", tmp_path / "run", "--ask", "123+456", "--device", "cpu")  # of a run without seed 0
    assert {"seed-1/student", "its"} <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    shutil.rmtree(tmp_path / "run")
    cli("eval", "--task", "instructions", "--model", student, "--ask", "add the hippo : 1", "--device", "cpu")
    assert capsys.readouterr().err.startswith("the model does not know 'the', 'hippo'\n")
    (tmp_path / "settings.json").touch()
    (tmp_path / ".student.tmp" / "student").mkdir(parents=True)
    (tmp_path / ".student.tmp" / "student" / "model.safetensors").touch()  # half written, when it was killed
    assert "has no finished student to ask" in refused("eval", "--model", tmp_path, "--ask", "1+2")
    for question in ("", "three + 4", "1 + 2 + 3"):
        assert "ask for the sum of two numbers, for example" in refused("eval", "--model", student, "--ask", question)


@pytest.mark.parametrize("words, sentence", [([], "--model is missing"), (["--model", "no/where/at-all"], "no/where/at-all is not a folder"),
                                             (["--modle", "x"], "unknown argument --modle; did you mean --model?"),
                                             (["--model", "x", "--questions", "0"], "--questions 0: it must be at least 1")])
def test_a_mistake_in_eval_is_named(refused, words, sentence):
    assert sentence in refused("eval", *words)


def test_the_report_rebuilds_the_marked_section(finished, cli, tmp_path, monkeypatch, capsys):
    record = read(finished[0] / "record.json")
    readme, results = tmp_path / "README.md", tmp_path / "results"
    before = "# Title ±\n\n<!-- addition -->\nan old table\n<!-- /addition -->\n\nThe end.\n"
    readme.write_text(before)
    monkeypatch.setattr(importlib.import_module("eval"), "__file__", str(tmp_path / "eval.py"))
    cli("eval", "--report")
    assert readme.read_text() == before  # no record yet: nothing is touched

    (results / "addition-pocket.json").write_text(json.dumps(record))
    cli("eval", "--report")
    assert "rebuilt: README.md and results/README.md" in capsys.readouterr().out
    text, page = readme.read_text(), (results / "README.md").read_text()
    assert text.startswith("# Title ±\n\n<!-- addition -->\n") and text.endswith("<!-- /addition -->\n\nThe end.\n")
    figure = "{mean:.1f} ± {std:.1f}".format(**record["metrics"]["after"])
    assert "an old table" not in text and f"| **student after** | 95 | {figure} |" in text and made_by(record) in text
    assert f"| **student after** | {figure} | 95 |" in page and record["command"] in page and record["hardware"] in page
    cli("eval", "--report")
    assert (readme.read_text(), (results / "README.md").read_text()) == (text, page)  # once more changes nothing


def test_a_damaged_record_is_named(cli, refused, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("text")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "addition-pocket.json").write_text('{"task": ')
    monkeypatch.setattr(importlib.import_module("eval"), "__file__", str(tmp_path / "eval.py"))
    assert "addition-pocket.json is damaged" in refused("eval", "--report")
    assert (tmp_path / "README.md").read_text() == "text"


def test_the_pocket_base_makes_itself(tmp_path, cli, capsys):
    """--task pocket in very small: it trains, measures itself and leaves a checkpoint that the addition run can start from."""
    cli("train", "--task", "pocket", "--base", "lists", "--steps", 3, "--batch", 4, "--held-out", 2, "--out", tmp_path,
        "--device", "cpu", "--jobs", 1)
    said = capsys.readouterr().out
    assert "| held-out items | % |" in said and "Pretraining text, for example" in said
    record = read(tmp_path / "record.json")
    assert record["task"] == "pocket" and set(record["metrics"]) == {"unary", "binary", "lookup", "operation"}
    assert load(tmp_path / "base")[1].backend.get_vocab() == pocket_tokenizer().backend.get_vocab()


def distance(folder: Path, questions: list[str]) -> float:
    """Nats a token between a model's direct answers and the true ones."""
    model, tokenizer = load(folder)
    answers = tokenizer.encode_answers([addition_questions.answer(q) for q in questions])
    prompts = tokenizer.encode_all([addition_questions.student_template(q) for q in questions])
    nats = [F.cross_entropy(logits, torch.tensor(answer), reduction="sum")
            for logits, answer in zip(score(model, prompts, answers), answers)]
    return float(sum(nats)) / sum(map(len, answers))


def test_quick_from_the_pocket_base(tmp_path, cli):
    """The README's first command, cut down: practice brings the student far nearer to the sums than the teacher, who is not
    used to answering at once. How many it hits, the whole of --quick shows.
    """
    if not (ROOT / "data" / "pocket" / "model.safetensors").exists():
        pytest.skip("data/pocket holds no checkpoint; `python train.py --task pocket --base lists --publish` makes it")
    cli("train", "--task", "addition", "--quick", "--model", ROOT / "data" / "pocket", "--out", tmp_path, "--device", "cpu",
        "--jobs", 1, "--train-questions", 300, "--teacher-epochs", 7, "--practice-questions", 400, "--student-epochs", 4,
        "--student-lr", 3e-3, "--until", "student")
    questions = addition_questions.test_questions(200, 3)
    assert read(tmp_path / "teacher_validation.json")["accuracy"] > 20  # about 46
    assert distance(tmp_path / "student", questions) < distance(tmp_path / "teacher", questions) / 2  # about 1.9 and 10.9


class Killed(BaseException):
    """In place of kill -9, without another process: nothing after a checkpoint was done."""


def test_a_run_in_less_memory_resumes_bit_for_bit(base, tmp_path, cli, monkeypatch, capsys):
    """Adapters, small batches, blocks computed twice: killed twice in the teacher's steps and once in the student's."""
    lean = {"lora_rank": 2, "micro_batch": 5, "checkpointing": True, "save_every": 0.0, "teacher_epochs": 11, "student_epochs": 15,
            "student_batch": 64, "practice_questions": 200,  # two batches if 128 to 191 answers are found: 145 to 173, by CPU
            "label_samples": 5, "until": "student", "dropout": 0.0}
    trained, saves, save, fit_copy = [], [], Run.save, Experiment.fit_copy
    monkeypatch.setattr(Experiment, "fit_copy", lambda *a: trained.append(fit_copy(*a)) or trained[-1])
    cli("train", *flags(base, tmp_path / "whole", **lean))
    printed = capsys.readouterr().out
    assert re.search(r"^memory: up to \d.* in training \(weights .* in practice; .* are free. Disk: ", printed, re.MULTILINE)

    def save_and_die(run):
        save(run)
        saves.append(run.step)
        if len(saves) in (7, 25, 60):
            raise Killed
    monkeypatch.setattr(Run, "save", save_and_die)
    for _ in range(3):
        with pytest.raises(Killed):
            cli("train", *flags(base, tmp_path / "broken", **lean))
    cli("train", *flags(base, tmp_path / "broken", **lean))
    assert saves == [*range(1, 45), *range(1, 31)]
    for name in ("teacher", "student"):
        whole, broken = ((tmp_path / run / name / "model.safetensors").read_bytes() for run in ("whole", "broken"))
        assert whole == broken, name
        assert whole != (base / "model.safetensors").read_bytes()
    for name, model in zip(("teacher", "student"), trained):
        saved = load(tmp_path / "whole" / name)[0].state_dict()
        assert saved.keys() == model.state_dict().keys()
        assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items()), name
