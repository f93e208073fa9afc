"""An experiment of one file through the frame, and the frame's parts by hand: records, tables, run folders."""

import json
import re
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator

import numpy as np
import pytest
import torch
from helpers import tiny_t5
from torch import nn

from minicd.distill import Context, identity, practice
from minicd.hf.checkpoint import load, save
from minicd.labels import Examples
from minicd.losses import LOSSES
from minicd.metrics import correlation, exact_match
from minicd.runtime.files import atomic_json
from minicd.tasks.folder import RunFolder
from minicd.tasks.item import shortened
from minicd.tasks.record import make_record, mean_of, runs_to_join, spread
from minicd.tasks.report import against_paper, bullet, columns, fill_regions, minutes_line, pm, rebuild, results_page, seeds_of, table
from minicd.tasks.run import Experiment, Stage, train
from minicd.tasks.settings import DistillSettings, RunSettings, changes, option
from minicd.tokenizer import word_tokenizer

CPU = torch.device("cpu")

# --- an experiment, as a user would write it ---

LETTERS = "abcdef"
ROWS = {"teacher": "teacher, told to", "before": "student before", "after": "student after"}


@dataclass
class NextSettings(DistillSettings):
    """One seed of the experiment."""

    items: int = option(256, "practice inputs", least=1)
    epochs: float = option(10.0, "passes over the practice set", above=0)
    lr: float = option(5e-3, "learning rate", above=0, most=10)
    batch_size: int = option(32, "batch size", least=1)


def after(letter: str) -> str:
    return LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)]


class Next(Experiment):
    """A teacher is told to name the next letter; the student sees the letter alone."""

    TITLE = "The next letter"
    Settings = NextSettings
    RECORDS = ("pocket",)
    PAPER = {"teacher": 100, "after": 99.5}
    QUICK = {"items": 64}
    context = Context(lambda n, rng: list(rng.choice(list(LETTERS), n)), lambda x: f"next : {x}", lambda x: x,
                      identity)

    def stages(self) -> Iterator[Stage]:
        yield Stage("teacher", self.teacher)
        yield Stage("practice", self.practise, ("teacher",), lambda items: f"{len(items)} letters practised")
        yield Stage("student", self.student, ("practice",))
        for row, model in (("teacher", "teacher"), ("before", "teacher"), ("after", "student")):
            yield Stage(f"scores/{row}", partial(self.score, row, model), (model,))

    def teacher(self) -> nn.Module:
        prompts = self.tokenizer.encode_all([self.context.teacher(x) for x in LETTERS])
        examples = Examples.hard(prompts * 16, self.tokenizer.encode_answers([after(x) for x in LETTERS]) * 16)
        settings = self.settings.fit_settings(loss="hard")
        return self.fit_copy(self.base, examples, settings, self.settings.epochs * 4, "teacher")

    def practise(self) -> Examples:
        return practice(self.folder.get("teacher"), self.tokenizer, self.context, self.settings.items,
                        self.settings.practice_settings(3), seed=self.seed)

    def student(self) -> nn.Module:
        return self.fit_copy(self.folder.get("teacher"), self.folder.get("practice"), self.settings.fit_settings(),
                           self.settings.epochs, "student")

    def score(self, row: str, model: str) -> dict[str, float]:
        template = self.context.teacher if row == "teacher" else self.context.student
        written = self.generate(self.folder.get(model), [template(x) for x in LETTERS], 3, temperature=0)
        return {x: 100.0 * exact_match(self.tokenizer.decode(y), after(x)) for x, y in zip(LETTERS, written)}

    def figures(self) -> dict[str, Any]:
        rows = {row: self.folder.get(f"scores/{row}") for row in ROWS}
        means = {row: float(np.mean(list(letters.values()))) for row, letters in rows.items()}
        return {"metrics": means, "by_letter": rows}

    @classmethod
    def table(cls, record: dict[str, Any]) -> str:
        return f"Letters named, %, {seeds_of(record)}\n\n{against_paper(record, ROWS)}"

    @classmethod
    def headline(cls, record: dict[str, Any]) -> str:
        return f"{pm(record['metrics']['after'])} % without being told to"


SEEDS = [0, 3]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> NextSettings:
    tokenizer, folder = word_tokenizer(["next", ":", *LETTERS]), tmp_path_factory.mktemp("base")
    save(tiny_t5(len(tokenizer)), tokenizer, folder)
    return NextSettings(model=str(folder), precision="fp32")


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory) -> Path:
    """Both seeds, one stage at a time."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train("next", Next, settings, SEEDS, out, CPU)
    return out


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The finished run, for a test to change."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def stage_files(out: Path) -> dict[str, Path]:
    """Name → every file that a stage has left, in all seeds."""
    return {str(path.relative_to(out)): path for path in sorted(out.rglob("*"))
            if path.is_file() and path.name not in ("wall.json", "record.json", "settings.json")}


def times(out: Path) -> dict[str, int]:
    return {name: path.stat().st_mtime_ns for name, path in stage_files(out).items()}


def test_seeds_and_stages_side_by_side_give_the_same(finished, settings, tmp_path):
    train("next", Next, settings, SEEDS, tmp_path / "run", CPU, jobs=2)
    ours, theirs = stage_files(tmp_path / "run"), stage_files(finished)
    assert list(ours) == list(theirs)
    for name in ours:
        if "notes" in Path(name).parts:
            assert read(ours[name]).get("losses") == read(theirs[name]).get("losses"), name
        else:
            assert ours[name].read_bytes() == theirs[name].read_bytes(), name
    one, other = read(tmp_path / "run" / "record.json"), read(finished / "record.json")
    own, timed = {"minutes": None, "runs": None}, set(one["minutes"])
    assert one | own == other | own and timed == set(other["minutes"])


def test_the_record_is_complete(finished, settings):
    record = read(finished / "record.json")
    assert (record["task"], record["scale"], record["seeds"]) == ("next", "pocket", SEEDS)
    assert re.fullmatch(r"([0-9a-f]{12}\+?)?", record["commit"]) and record["commits"] == record["commit"]
    assert record["command"].startswith("python") and "threads" in record["hardware"]
    assert record["torch"] == torch.__version__ and record["precision"] == "fp32"
    assert record["settings"] == vars(settings) and record["paper"] == {"teacher": 100, "after": 99.5}
    stages = {"teacher", "practice", "student", "scores--teacher", "scores--before", "scores--after"}
    minutes = record["minutes"]
    assert set(minutes) == {"total", "wall"} | stages and all(len(minutes[stage]) == 2 for stage in stages | {"total"})
    assert minutes["wall"] >= 0.9 * sum(minutes["total"]) - 0.02
    metrics = record["metrics"]
    assert set(metrics) == set(ROWS) and all(len(metric["values"]) == 2 for metric in metrics.values())
    assert metrics["teacher"] == {"values": [100.0, 100.0], "mean": 100.0, "std": 0.0} == metrics["after"]
    assert record["by_letter"]["after"] == dict.fromkeys(LETTERS, 100.0)
    for stage in ("teacher", "student"):
        assert record["final_losses"][stage] == [round(read(folder / "notes" / f"{stage}.json")["losses"][-1], 5)
                                                 for folder in (finished, finished / "seed-3")]
    assert set(record["final_losses"]) == {"teacher", "student"}


def test_what_a_run_prints(settings, copy, capsys):
    """A rerun shows the finished stages again, and says the same at its end."""
    train("next", Next, settings, SEEDS, copy, CPU)
    printed = capsys.readouterr().out
    assert printed.startswith(f"The next letter\npocket scale, seeds 0 3, in {copy}, on cpu, 1 stage at a time\n"
                              f"differs from the defaults: --precision fp32 --model {settings.model}\n")
    assert printed.count("256 letters practised\n") == 2
    assert ("Letters named, %, 2 seeds, pocket scale\n\n|  | minicd | paper |\n| --- | ---: | ---: |\n"
            "| teacher, told to | 100.0 ± 0.0 | 100 |\n| student before | ") in printed
    assert printed.endswith(f"\n{minutes_line(read(copy / 'record.json'))}\nEverything is in {copy}\n")


@pytest.mark.parametrize("lost, noted", [(["scores/after.json"], ["scores--after"]),
                                         (["student", "scores/before.json"], ["student", "scores--before"])])
def test_what_is_missing_is_made_anew_and_nothing_else(settings, copy, lost, noted):
    before, bytes_before = times(copy), {name: path.read_bytes() for name, path in stage_files(copy).items()}
    made = {name for name in before if name.startswith(tuple(f"seed-3/{part}" for part in lost))}
    for name in made:
        (copy / name).unlink()
    train("next", Next, settings, SEEDS, copy, CPU)
    now = times(copy)
    assert {name for name in now if now[name] != before[name]} == made | {f"seed-3/notes/{name}.json" for name in noted}
    assert all(path.read_bytes() == bytes_before[name] for name, path in stage_files(copy).items()
               if "notes" not in name)


def test_a_seed_more_leaves_the_others_alone(settings, copy):
    before = times(copy)
    train("next", Next, settings, [*SEEDS, 1], copy, CPU)
    assert read(copy / "record.json")["seeds"] == [0, 3, 1]
    assert {name: time for name, time in times(copy).items() if not name.startswith("seed-1/")} == before


def test_other_settings_want_another_folder(settings, copy):
    before = times(copy)
    for change, sentence in (({"lr": 1.0}, r"lr \(there 0.005, now 1.0\);"),
                             ({"items": 7}, r"items \(there 256, now 7\);")):
        with pytest.raises(ValueError, match=f"holds a run with other settings: {sentence}"):
            train("next", Next, replace(settings, **change), SEEDS, copy, CPU)
    train("next", Next, replace(settings, save_every=7.0), SEEDS, copy, CPU)  # which no stage depends on
    assert times(copy) == before


def test_a_damaged_stage_is_named(settings, copy):
    (copy / "student" / "model.safetensors").unlink()
    for name in ("teacher/model.safetensors", "practice.safetensors", "scores/before.json"):
        good = (copy / name).read_bytes()
        for bad in (good[: len(good) // 2], b""):
            (copy / name).write_bytes(bad)
            with pytest.raises(ValueError, match=f"{re.escape(str(copy / name))}.* damaged") as error:
                train("next", Next, settings, SEEDS, copy, CPU)
            assert len(str(error.value).splitlines()) == 1
        (copy / name).write_bytes(good)
    train("next", Next, settings, SEEDS, copy, CPU)


def test_publishing_writes_the_record_into_results(settings, copy, tmp_path, monkeypatch):
    monkeypatch.setattr("minicd.tasks.run.ROOT", tmp_path)
    train("next", Next, settings, SEEDS, copy, CPU)
    assert not (tmp_path / "results").exists()
    train("next", Next, settings, SEEDS, copy, CPU, publish=True)
    record = read(tmp_path / "results" / "next-pocket.json")
    assert record == read(copy / "record.json")

    readme = tmp_path / "README.md"
    text = "before\n<!-- others -->\n{}\n<!-- /others -->\n<!-- addition -->\nkept\n<!-- /addition -->\nafter\n"
    readme.write_text(text.format("an old line"))
    bench = {"bench": ("A bench", lambda record: "| its | table |"), "no-record": ("Nothing", lambda record: "")}
    (tmp_path / "results" / "bench.json").write_text("{}")
    rebuild(tmp_path, {"next": Next}, bench)
    assert readme.read_text() == text.format(
        f"* **The next letter**, `--task next`, two seeds: {Next.headline(record)}")
    page = (tmp_path / "results" / "README.md").read_text()
    assert "## The next letter\n\n" + Next.table(record) + "\n\n" + minutes_line(record) in page
    assert "## A bench\n\n| its | table |\n" in page and "Nothing" not in page and record["command"] in page
    assert "What differs" not in page
    pages = results_page(tmp_path / "results", {"next-pocket": ("A title", Next.table, "\n* the size\n")})
    assert pages.endswith("What differs from the paper:\n\n* the size\n") and "## A title" in pages


def test_a_table_with_a_column_for_each_record():
    def record(scale: str, **metrics) -> dict:
        return {"scale": scale, "seeds": [0, 1], "metrics": metrics, "paper": {"a": 93}, "minutes": {"total": [7.2, 9.6], "wall": 12},
                "command": f"python train.py --scale {scale}", "hardware": "a machine", "commit": "abc"}
    text = columns([record("smollm2", a={"mean": 91.5, "std": 0.5}), record("pocket", a={"mean": 99, "std": 1}, b={"mean": 2, "std": None})],
                   {"a": "the first", "b": "the second", "c": "nowhere"})
    assert text.splitlines()[0] == "|  | paper | SmolLM2-135M | pocket |"
    assert text.splitlines()[2:5] == ["| the first | 93 | 91.5 ± 0.5 | 99.0 ± 1.0 |", "| the second |  |  | 2.0 |",
                                      "| minutes a seed, all stages |  | 10 | 10 |"]
    assert "* SmolLM2-135M: 2 seeds by `python train.py --scale smollm2`" in text


def test_seeds_of_different_machines_are_not_averaged():
    joined = {"scale": "pocket", "seeds": [0, 1], "metrics": {}, "paper": {}, "minutes": {"total": [182.6, 6.7]},
              "command": "python train.py; python train.py --seeds 1 --join", "hardware": "a CPU; a GPU", "commit": "abc; def"}
    text = columns([joined], {})
    assert "| minutes a seed, all stages |  | 7–183 |" in text
    assert "* pocket: 2 seeds, the first by `python train.py` on a CPU; a GPU" in text


def test_a_record_that_only_the_readme_cannot_show_is_named(tmp_path):
    class Front(Next):
        RECORDS = ("pocket",)
        table = classmethod(lambda cls, record: "shown")
        front = classmethod(lambda cls, records: columns(records, {"a": "the first"}))
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text("text")
    (tmp_path / "results" / "next-pocket.json").write_text('{"scale": "pocket", "metrics": {}}')
    with pytest.raises(ValueError, match="next-pocket.json is not a record that can be shown"):
        rebuild(tmp_path, {"next": Front}, {})


def test_finished_stages_are_borrowed_whole(settings, copy, tmp_path):
    """Models, practice sets and notes; what the folder has already stays as it is, half a copy does not count."""
    borrower = RunFolder(tmp_path / "borrower", CPU)
    (tmp_path / "borrower" / ".student.tmp").mkdir(parents=True)
    (tmp_path / "borrower" / ".student.tmp" / "config.json").write_text("half")
    borrower.borrow(copy, ["practice", "student", "scores/after"])
    for name in ("practice.safetensors", "student/model.safetensors", "scores/after.json", "notes/student.json",
                 "notes/scores--after.json"):
        assert (tmp_path / "borrower" / name).read_bytes() == (copy / name).read_bytes(), name
    assert not list((tmp_path / "borrower").rglob(".*")) and borrower.file("teacher") is None
    load(tmp_path / "borrower" / "student")

    borrower.keep("scores/after", {"a": 1.0}, None)
    borrower.borrow(copy, ["scores/after"])
    assert borrower.get("scores/after") == {"a": 1.0}
    shutil.rmtree(copy / "teacher")
    with pytest.raises(ValueError, match=f"{re.escape(str(copy / 'teacher'))} is missing: there is no finished"):
        borrower.borrow(copy, ["teacher"])


# --- its parts ---


def test_spread_and_mean():
    assert spread([1.0, 3.0]) == {"values": [1.0, 3.0], "mean": 2.0, "std": 1.4142}
    assert spread([1.005])["std"] is None
    assert mean_of([{"a": 1.0, "b": [2, 4]}, {"a": 2.0, "b": [4, 4], "c": 5}]) == {"a": 1.5, "b": [3, 4], "c": 5}


def test_a_record_of_two_seeds():
    notes = [{"student": {"minutes": 1.234, "hardware": "a", "commit": "c1", "losses": [2.0, 0.5]}},
             {"student": {"minutes": 2.0, "hardware": "b", "commit": "c1", "losses": [2.0, 0.25]}, "x": {"minutes": 1.0}}]
    figures = [{"metrics": {"after": 90.0}, "points": {"t": [1.0, 2.0]}},
               {"metrics": {"after": 92.0}, "points": {"t": [3.0, 4.0]}}]
    record = make_record("mine", RunSettings(), [0, 5], figures, notes, {"after": 95})
    assert record["metrics"]["after"] == {"values": [90.0, 92.0], "mean": 91.0, "std": 1.4142}
    assert record["points"] == {"t": [2.0, 3.0]} and record["final_losses"] == {"student": [0.5, 0.25]}
    assert record["minutes"] == {"total": [1.23, 3.0], "student": [1.23, 2.0], "x": [0.0, 1.0]}
    assert record["hardware"] == "a; b" and record["commits"] == "c1" and record["paper"] == {"after": 95}
    assert record["command"].startswith("python") and record["settings"]["scale"] == "pocket"
    assert against_paper(record, {"after": "student", "gone": "no such row"}) == (
        "|  | minicd | paper |\n| --- | ---: | ---: |\n| student | 91.0 ± 1.4 | 95 |")
    assert minutes_line(record) == "minutes a seed: all stages 1.2/3.0, student 1.2/2.0, x 0.0/1.0"


def test_more_seeds_join_a_record(tmp_path):
    def made(seeds, earlier=()):
        figures = [{"metrics": {"after": 90.0 + seed}, "points": {1: [float(seed)]}} for seed in seeds]
        notes = [{"student": {"minutes": 1.0 + seed, "hardware": f"machine {seed}", "losses": [2.0, 0.5]}} for seed in seeds]
        return make_record("mine", RunSettings(), seeds, figures, notes, {"after": 95}, earlier)
    alone, one = json.loads(json.dumps(made([0, 1, 2]))), {"files": {"a": "1"}, "base": {"b": "3"}, "loss_source": 4}
    atomic_json(tmp_path / "mine.json", made([0, 5]) | {"files": {"a": "1"}})
    for more in ([2], [1, 2]):
        runs = runs_to_join(tmp_path / "mine.json", one, partial(changes, RunSettings()))
        atomic_json(tmp_path / "mine.json", made(more, [run for run in runs if run["seed"] != 5]) | {"files": {"a": "1"}})
    joined = json.loads((tmp_path / "mine.json").read_text())
    assert joined == alone | {"files": {"a": "1"}} and joined["hardware"] == "machine 0; machine 1; machine 2"
    with pytest.raises(ValueError, match="other data files"):
        runs_to_join(tmp_path / "mine.json", {**one, "files": {"a": "2"}}, partial(changes, RunSettings()))
    atomic_json(tmp_path / "newer.json", made([0]) | one)
    for name, other in (("base", {"b": "5"}), ("loss_source", 6)):
        with pytest.raises(ValueError, match=f"made from another {name.split('_')[0]}: no seed can join it"):
            runs_to_join(tmp_path / "newer.json", one | {name: other}, partial(changes, RunSettings()))
    with pytest.raises(ValueError, match="precision .there 'auto', now 'bf16'"):
        runs_to_join(tmp_path / "mine.json", one, partial(changes, RunSettings(precision="bf16")))
    assert runs_to_join(tmp_path / "mine.json", one, partial(changes, RunSettings(save_every=1.0))) and (
        runs_to_join(tmp_path / "none.json", one, partial(changes, RunSettings())) == [])
    atomic_json(tmp_path / "old.json", {"task": "mine", "settings": {}})
    with pytest.raises(ValueError, match="keep its runs apart"):
        runs_to_join(tmp_path / "old.json", one, partial(changes, RunSettings()))


def test_tables_and_regions():
    assert table(["a", "b"], [["x", 1]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
    assert pm({"mean": 1.25, "std": None}, 2) == "1.25"
    text = "one\n<!-- t -->\nold\n<!-- /t -->\n<!-- u -->\nkept\n<!-- /u -->\n"
    assert fill_regions(text, {"t": "new", "u": "", "v": "nowhere"}) == text.replace("old", "new")


def test_a_folder_keeps_gets_and_borrows(tmp_path):
    first, second = RunFolder(tmp_path / "a", CPU), RunFolder(tmp_path / "b", CPU)
    with first.timed("scores/one"):
        first.keep("scores/one", {"x": 1}, None)
    assert first.get("scores/one") == {"x": 1} and first.notes()["scores--one"]["minutes"] >= 0
    with pytest.raises(ValueError, match="no finished stage two"):
        first.get("two")
    second.borrow(first.path, ["scores/one"])
    assert second.get("scores/one") == {"x": 1} and second.notes() == first.notes()
    with pytest.raises(ValueError, match="is missing: there is no finished stage to reuse"):
        second.borrow(first.path, ["two"])
    (tmp_path / "a" / "scores" / "one.json").write_text("{")
    with pytest.raises(ValueError, match="one.json is damaged"):
        first.get("scores/one")


def test_a_folder_belongs_to_its_settings(tmp_path):
    folder = RunFolder(tmp_path, CPU)
    folder.claim(RunSettings())
    folder.claim(RunSettings(precision="fp32"))  # nothing depends on them yet
    folder.keep("x", 1, None)
    folder.claim(RunSettings(precision="fp32", save_every=1.0))  # which changes no result
    with pytest.raises(ValueError, match="precision .there 'fp32', now 'bf16'."):
        folder.claim(RunSettings(precision="bf16"))
    assert json.loads((tmp_path / "settings.json").read_text())["precision"] == "fp32"


def test_a_folder_belongs_to_its_task_and_seed(tmp_path):
    folder = RunFolder(tmp_path, CPU)
    folder.claim(DistillSettings(), 3)
    folder.keep("x", 1, None)
    folder.claim(DistillSettings(), 3)
    with pytest.raises(ValueError, match="holds a run of seed 3, not 0; choose another folder with --out"):
        folder.claim(DistillSettings(), 0)
    with pytest.raises(ValueError, match="holds a run of another task; choose another folder"):
        folder.claim(NextSettings(), 3)


def test_what_an_abandoned_start_noted_is_not_counted(tmp_path):
    """Unless its settings were the same: then it is time spent on this run."""
    folder = RunFolder(tmp_path, CPU)
    folder.claim(RunSettings(), 0)
    for settings, minutes in ((RunSettings(), 5.0), (RunSettings(precision="fp32"), 0.0)):
        folder.note("teacher", minutes=5.0)
        folder.claim(settings, 0)
        with folder.timed("teacher"):
            pass
        assert folder.read_note("teacher")["minutes"] == pytest.approx(minutes, abs=0.1)


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_stage_that_goes_on_names_all_commits_and_machines(tmp_path, monkeypatch, goes_on):
    folder = RunFolder(tmp_path, CPU)
    for name in ("one", "two", "two"):
        monkeypatch.setattr("minicd.tasks.folder.commit", lambda: name)
        monkeypatch.setattr("minicd.tasks.folder.hardware", lambda device: f"machine {name}")
        with folder.timed("teacher", precision="bf16" if name == "one" else "fp32"):
            if goes_on:
                folder.checkpoint("teacher").write_text("")
    note, both = folder.read_note("teacher"), "one; two" if goes_on else "two"
    assert note["commit"] == both and note["precision"] == ("bf16; fp32" if goes_on else "fp32")
    assert note["hardware"] == "; ".join(f"machine {name}" for name in both.split("; "))
    record = make_record("mine", RunSettings(), [0, 1], [{"metrics": {}}] * 2, [{"teacher": note}, {"teacher": note | {"commit": "two"}}], {})
    assert record["commits"] == both


def test_data_that_changed_since_want_another_folder(settings, copy, tmp_path, monkeypatch):
    """Else the record would name a new file beside figures of the old one. A folder that does not say goes on."""
    (data := tmp_path / "letters.txt").write_text("a")
    monkeypatch.setattr(Next, "files", lambda self: [data])
    for folder in (copy, copy / "seed-3"):
        (folder / "data.json").unlink()
    for _ in range(2):
        train("next", Next, settings, SEEDS, copy, CPU)
    data.write_text("b")
    with pytest.raises(ValueError, match="holds a run with other data: letters.txt has changed since; choose another"):
        train("next", Next, settings, SEEDS, copy, CPU)
    monkeypatch.setattr(Next, "files", lambda self: [])
    with pytest.raises(ValueError, match="other data: letters.txt has changed since"):  # it is gone
        train("next", Next, settings, SEEDS, copy, CPU)
    borrower = RunFolder(tmp_path / "borrower", CPU)
    for digest in ("one", "another"):  # nothing depends on it yet
        borrower.claim(settings, 0)
        borrower.claim_data({"letters.txt": digest})
    with pytest.raises(ValueError, match="borrower holds a run with other data"):
        borrower.borrow(copy, ["practice"])


def test_a_base_that_was_made_anew_wants_another_folder(settings, tmp_path):
    """Stages of two bases would stand in one record."""
    shutil.copytree(settings.model, base := tmp_path / "base")
    own = replace(settings, model=str(base), items=32, epochs=1.0)
    for _ in range(2):
        train("next", Next, own, [0], tmp_path / "run", CPU)
    save(tiny_t5(len(load(base)[1]), seed=8), load(base)[1], base)
    with pytest.raises(ValueError, match="holds a run with other data: model.safetensors has changed since"):
        train("next", Next, own, [0], tmp_path / "run", CPU)


def test_a_record_that_no_seed_can_join_is_refused_before_any_work(settings, tmp_path, monkeypatch):
    from minicd.tasks import run as frame
    monkeypatch.setattr(frame, "ROOT", tmp_path)
    monkeypatch.setattr(Next, "make", None)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "next-pocket.json").write_text('{"settings": {}}')
    with pytest.raises(ValueError, match="does not keep its runs apart"):
        train("next", Next, settings, [3], tmp_path / "run", CPU, publish=True, join=True)


def test_a_record_with_a_name_of_its_own_is_joined_and_the_first_seed_published(settings, copy, tmp_path, monkeypatch):
    class Named(Next):
        @classmethod
        def record_scale(cls, settings: NextSettings) -> str:
            return "mine"

        def publish(self) -> None:
            published.append(self.seed)
    from minicd.tasks import run as frame
    published = []
    monkeypatch.setattr(frame, "ROOT", tmp_path)
    train("next", Named, settings, [0], copy, CPU, publish=True)
    train("next", Named, settings, [3], copy, CPU, publish=True, join=True)
    record = json.loads((tmp_path / "results" / "next-mine.json").read_text())
    assert (record["scale"], record["seeds"], published) == ("mine", [0, 3], [0])


def test_a_seed_that_was_published_meanwhile_stays_in_the_record(settings, copy, tmp_path, monkeypatch):
    """Two runs side by side, each with --join, began with the same record."""
    monkeypatch.setattr("minicd.tasks.run.ROOT", tmp_path)
    train("next", Next, settings, [3], copy, CPU, publish=True)
    published = tmp_path / "results" / "next-pocket.json"
    by_another = published.read_bytes()
    published.unlink()
    original = Next.figures

    def figures(self):
        published.write_bytes(by_another)
        return original(self)
    monkeypatch.setattr(Next, "figures", figures)
    train("next", Next, settings, [0], copy, CPU, publish=True, join=True)
    assert read(published)["seeds"] == [0, 3]


def test_the_minutes_are_those_of_the_runs_stages(settings, copy):
    """The folder may hold others: of a line of a curve that is not asked for any more, say."""
    before, folder = read(copy / "record.json"), RunFolder(copy, CPU)
    for name in ("other", "practice.parts/chunk-0000"):
        folder.note(name, minutes=100.0)
    train("next", Next, settings, SEEDS, copy, CPU)
    now = read(copy / "record.json")["minutes"]
    assert "other" not in now and now["practice.parts--chunk-0000"] == [100.0, 0.0]
    assert now["total"][0] == pytest.approx(before["minutes"]["total"][0] + 100, abs=0.5)


def test_a_folder_is_not_claimed_for_a_loss_that_was_edited(tmp_path, monkeypatch):
    """Its students would be shown as if the loss had made them."""
    folder = RunFolder(tmp_path, CPU)
    folder.claim(DistillSettings())
    folder.keep("figures", {}, None)
    folder.claim(DistillSettings())
    monkeypatch.setitem(LOSSES, "empirical", lambda logits, labels: logits.sum(-1))
    with pytest.raises(ValueError, match="the loss empirical was edited since the run in .* began"):
        folder.claim(DistillSettings())


def test_correlation():
    r, p = correlation([(0, 0), (1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12), (7, 14)])
    assert r == pytest.approx(1.0) and p < 0.001
    assert correlation([(1, 2), (1, 3), (1, 4)]) == (0.0, 1.0)
    r, p = correlation([(0, 3), (1, 2), (2, 1)])
    assert r == pytest.approx(-1.0) and p > 0.9


# --- damage ---


def flip_digit(path: Path) -> None:
    """Another digit: still what JSON calls a file, but not what was written."""
    text = path.read_text()
    at = max(i for i, c in enumerate(text) if c in "123456789" and text[i - 1] in " .0123456789")
    path.write_text(text[:at] + ("5" if text[at] != "5" else "6") + text[at + 1 :])


@pytest.mark.parametrize("name, advice", [
    ("scores/before.json", "delete {path} to run the stage scores/before anew"),
    ("student/config.json", "delete {path.parent} to run the stage student anew"),
    ("settings.json", "delete this folder, or choose another with --out"),
    ("notes/student.json", "delete it, and the record will lack minutes and losses of student"),
    ("wall.json", "delete it to count from zero"), ("data.json", "delete it, and data are not compared")])
@pytest.mark.parametrize("damage", [flip_digit, lambda path: path.write_text("[1]"),
                                    lambda path: path.write_text('{"version": 1}'), lambda path: path.write_text("{"),
                                    lambda path: path.write_bytes(b"")], ids=["digit", "list", "object", "cut", "empty"])
def test_json_that_is_not_what_was_written_is_named_with_the_right_advice(settings, copy, name, advice, damage):
    path = copy / name
    (copy / "scores" / "after.json").unlink()
    damage(path)
    with pytest.raises(ValueError) as error:
        train("next", Next, settings, SEEDS, copy, CPU)
    said = str(error.value)
    if "holds a run with other settings: version (there 1, now None)" in said:  # as a file from before checksums
        assert name == "settings.json" and said.endswith("choose another folder with --out, or delete this one")
        return
    assert said.startswith(f"{path} ") and said.endswith(advice.format(path=path)) and len(said.splitlines()) == 1, said
    if name in ("wall.json", "notes/student.json", "data.json"):  # the advice can be taken, and nothing that was made is lost
        path.unlink()
        train("next", Next, settings, SEEDS, copy, CPU)
        assert read(copy / "record.json")["metrics"]["after"]["mean"] == 100.0


@pytest.mark.parametrize("one, other", [("scores/before.json", "scores/teacher.json"), ("practice.safetensors", "seed-3/practice.safetensors"),
                                        ("student/model.safetensors", "teacher/model.safetensors")])
def test_one_stages_file_in_the_place_of_another(settings, copy, one, other):
    (copy / "scores" / "after.json").unlink(), shutil.rmtree(copy / "student" if one.startswith("practice") else copy / "none", True)
    (copy / one).write_bytes((copy / other).read_bytes())
    with pytest.raises(ValueError, match=f"{re.escape(str(copy / one))} is damaged: it is not what was written"):
        train("next", Next, settings, SEEDS, copy, CPU)


def test_a_file_beside_a_model_does_not_stand_for_it(settings, copy):
    (copy / "scores" / "after.json").unlink()
    (copy / "student.json").write_text("{}")
    with pytest.raises(ValueError, match="student.json is damaged: it is not of the stage student"):
        train("next", Next, settings, SEEDS, copy, CPU)


def test_a_folder_from_before_checksums_is_read(settings, copy, capsys):
    """And a note that is lost is said to be."""
    before = read(copy / "record.json")
    for path in copy.rglob("*.json"):
        value = read(path)
        if isinstance(value, dict) and path.parent.name == "notes" or path.name == "settings.json":
            path.write_text(json.dumps({k: v for k, v in value.items() if k not in ("crc32", "files")}))
    (copy / "wall.json").write_text(json.dumps(read(copy / "wall.json")["minutes"]))
    train("next", Next, settings, SEEDS, copy, CPU)
    assert "is missing" not in capsys.readouterr().out
    again = read(copy / "record.json")
    assert again["metrics"] == before["metrics"] and again["minutes"]["wall"] >= before["minutes"]["wall"]
    (copy / "wall.json").unlink()  # as where a kill has lost it
    train("next", Next, settings, SEEDS, copy, CPU)
    assert "wall" not in read(copy / "record.json")["minutes"]
    (copy / "notes" / "student.json").unlink()
    train("next", Next, settings, SEEDS, copy, CPU)
    assert f"{copy / 'notes' / 'student.json'} is missing: the record lacks" in capsys.readouterr().out


def test_a_stage_that_is_made_again_replaces_its_checksums(settings, copy):
    folder = RunFolder(copy, CPU)
    folder.keep("scores/after", {"a": 1.0}, None)
    assert folder.get("scores/after") == {"a": 1.0} and not list(copy.rglob(".*"))
    borrower = RunFolder(copy.parent / "borrower", CPU)
    borrower.keep("scores/after", {"b": 1.0}, None)
    (borrower.path / "scores" / "after.json").unlink()
    borrower.borrow(copy, ["scores/after"])
    assert borrower.get("scores/after") == {"a": 1.0}
    flip_digit(copy / "scores" / "teacher.json")
    with pytest.raises(ValueError, match="teacher.json is damaged"):
        borrower.borrow(copy, ["scores/teacher"])
    assert not (borrower.path / "scores" / "teacher.json").exists()


def test_a_record_of_another_shape_is_named(copy, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text("")
    for text in ("[]", "3", "{}", '{"metrics": []}', '{"metrics": {"after": 3}, "seeds": 3}'):
        (tmp_path / "results" / "next-pocket.json").write_text(text)
        with pytest.raises(ValueError, match="results/next-pocket.json is not a record that can be shown"):
            rebuild(tmp_path, {"next": Next}, {})


def test_a_stage_of_another_shape_without_a_note_is_named(tmp_path):
    """Its checksum is gone with the note, so the file is read as it is."""
    experiment = Experiment(RunSettings(), 0, RunFolder(tmp_path, CPU))
    (tmp_path / "figures.json").write_text('{"other": 1}')
    with pytest.raises(ValueError, match="figures.json is damaged: it is not of the stage figures; delete it"):
        experiment.tell(Stage("figures", dict, show=lambda value: value["shown"]))


def test_a_record_has_the_ends_of_long_texts():
    short, long = ("  title" + 13 * " " + "\n".join(map(str, range(n))) for n in (15, 50))
    assert shortened(short) == short
    lines = shortened(f"{long}\n{short}\n{long}").split("\n")
    assert len(lines) == 12 + 15 + 12 and [line.startswith("  title") for line in lines].count(True) == 3
    assert lines[1:6] + lines[7:12] == [*map(str, range(1, 6)), *map(str, range(45, 50))]
    assert "[39 lines left out]" in lines[6] and "[39 lines left out]" in lines[33]


def test_a_line_of_readme_holds_all_records_of_an_experiment():
    kind = SimpleNamespace(TITLE="Sums (table 9)", SCALES={"pocket": {}, "big": {}}, headline=lambda record: record["line"])
    small, big, silent = ({"scale": scale, "seeds": seeds, "line": line} for scale, seeds, line in (
        ("pocket", [0, 1], "up"), ("big", [0], "down"), ("big", [0], "")))
    assert bullet("sums", kind, [small, big]) == "* **Sums**, `--task sums`, two seeds: up; `--scale big`, one seed: down"
    assert bullet("sums", kind, [big]) == "* **Sums**, `--task sums --scale big`, one seed: down"
    assert bullet("sums", kind, [silent]) == bullet("sums", kind, []) == ""
    small, big = ({**record, "line": f"{record['line']} (paper: 7, 8)"} for record in (small, big))
    assert bullet("sums", kind, [small, big]).endswith("`--task sums`, two seeds: up (paper: 7, 8); `--scale big`, one seed: down")
