"""Controlled generation: the judge and diversity by hand, files and splits, the whole experiment on a random model."""

import importlib
import json
import math
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_plain import tiny_decoder, tiny_tokenizer

from minicd.hf.checkpoint import save
from minicd.metrics.diversity import distinct_2, diversity, mutual_rouge, pair_of, word_entropy
from minicd.metrics.sentiment import Judge, cross_validated, parts
from minicd.sampling import generate, score
from minicd.tasks.control import Control, ControlSettings, write_beginnings
from minicd.tasks.folder import RunFolder
from minicd.tasks.parts.forgetting import kl_to_base
from minicd.tasks.parts.instruction_eval import end_with_line
from minicd.tasks.parts.reviews import (KINDS, SPLITS, first_halves, of_split, read_reviews, split_of, texts_of, write_reviews,
                                        written_reviews)
from minicd.tasks.parts.steering import ENDINGS, STEERS, bare_review, steered
from minicd.tasks.settings import guarded

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data" / "sentiment" / "imdb_labelled.txt"
OURS = ROOT / "data" / "control"
SMALL = ["--written", 30, "--own-texts", 10, "--practice-inputs", 12, "--epochs", 1, "--batch-size", 4, "--label-samples", 5,
         "--samples", 2, "--test-beginnings", 3, "--max-new-tokens", 8, "--device", "cpu", "--jobs", 1, "--precision", "fp32"]


def tiny_author():
    """Random letters in short words, in lines of two dozen or so."""
    tokenizer = tiny_tokenizer()
    model, [space] = tiny_decoder(tokenizer, share=0.05), tokenizer.encode(" ")
    with torch.no_grad():
        model.lm_head.weight[space, 0] = math.log(0.25 * len(tokenizer)) / 4
    return model, tokenizer


@pytest.fixture(scope="module")
def author(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("author")
    save(*tiny_author(), folder)
    return folder


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Path:
    """Like the real file: some reviews of each kind that are long enough for a beginning."""
    path = tmp_path_factory.mktemp("data") / "sentences.txt"
    write_reviews(path, [(f"film number {i} is a {'good' if label else 'bad'} one and {'fine' if label else 'dull'}", label)
                         for i in range(40) for label in (0, 1)])
    return path


@pytest.fixture
def run(monkeypatch):
    def start(program: str, *words) -> None:
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *map(str, words)])
        guarded(importlib.import_module(program).main)
    return start


# --- the judge ---


def test_the_judge_by_hand():
    judge = Judge.train([("Good!", 1), ("bad", 0)])
    assert judge.weights == pytest.approx({"good": math.log(1.3 / 0.3), "bad": -math.log(1.3 / 0.3)})
    assert judge.score("good good") == judge.score("Good.") == pytest.approx(math.log(1.3 / 0.3)) and judge.score("") == 0
    assert judge.share(["good", "bad", "who knows", ""], 1) == judge.share(["good", "bad", "who knows", ""], 0) == 25
    assert judge.accuracy([("bad", 0), ("good", 0), ("good", 1), ("who knows", 1)]) == 50


def test_a_pair_counts_where_its_words_do_not():
    """What "not good" says, its words alone do not; a pair that one review has is not kept."""
    judge = Judge.train([("not good", 0), ("it is not good", 0), ("good", 1), ("so good", 1), ("why not", 1), ("bad", 0)])
    assert judge.weights["not good"] < 0 < judge.weights["good"] and "so good" not in judge.weights
    assert parts("It's not, not good") == ["it's", "not", "good", "it's not", "not not", "not good"]


def test_a_judge_needs_both_kinds():
    with pytest.raises(ValueError, match="without bad reviews"):
        Judge.train([("good", 1)])


def test_cross_validation_holds_out():
    """Each review is judged by what the others say: with labels of its own word only, nobody knows it."""
    assert cross_validated([(f"w{i} good" if i % 2 else f"w{i} bad", i % 2) for i in range(10)]) == 100
    assert cross_validated([(f"w{i}", i % 2) for i in range(10)]) == 0
    assert cross_validated([("fine", 1)], [("fine", 1), ("dull", 0)]) == 100


@pytest.mark.skipif(not REAL.exists(), reason="the labelled sentences are not here (shared/data)")
def test_the_judge_on_real_sentences():
    """Right about four of five in five-fold cross-validation."""
    reviews = read_reviews(REAL)
    random.Random(0).shuffle(reviews)
    assert len(reviews) > 950 and 0.45 < sum(label for _, label in reviews) / len(reviews) < 0.55
    assert cross_validated(reviews) >= 78


# --- diversity ---


def test_diversity_by_hand():
    assert word_entropy(["a b", "c d"]) == 2 and word_entropy(["a a", "A"]) == 0 and word_entropy(["", ""]) == 0
    assert distinct_2(["a b a b", "a b"]) == pytest.approx(50) and distinct_2(["a"]) == 0  # ab, ba of four pairs
    assert mutual_rouge(["one two", "one two", "six"]) == pytest.approx(100 / 3) and mutual_rouge(["alone"]) == 0
    assert mutual_rouge(["one two three four", "two four"]) == pytest.approx(100 * 2 * 1 * 0.5 / 1.5)


def test_the_pairs_of_many_texts_are_numbered():
    """So that a thousand of fifty million need no list of all."""
    assert [pair_of(k) for k in range(66)] == [(i, j) for i in range(12) for j in range(i)]
    n = 20_000
    assert pair_of(n * (n - 1) // 2 - 1) == (n - 1, n - 2) and pair_of((n - 1) * (n - 2) // 2) == (n - 1, 0)


def test_one_ending_shows():
    collapsed = diversity(["what a wonderful film"] * 60)
    varied = diversity([f"w{i} x{i} y{i}" for i in range(60)])
    assert collapsed["rouge"] == 100 and varied["rouge"] == 0
    assert collapsed["entropy"] < varied["entropy"] and collapsed["distinct_2"] < 2 < varied["distinct_2"]


# --- files and splits ---


@pytest.mark.parametrize("content, sentence", [
    ("good\t1\nno tab 0\n", "line 2: after the review there must be a tab and 1 or 0, not 'no tab 0'"),
    ("good\t1\nbad\t2\n", "line 2: after the review there must be a tab and 1 or 0, not '2'"),
    ("good\t1\nbad\t\n", "line 2: after the review there must be a tab and 1 or 0, not ''"),
    ("good\t1\n\n ... \t0\n", "line 3: the review is empty"), ("\t1\n", "line 1: the review is empty"),
    ("good\t1\n", "has no negative review"), ("", "has no negative review")])
def test_a_file_that_cannot_be_read(content, sentence, tmp_path, run, author):
    path = tmp_path / "reviews.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match="reviews.txt") as error:
        read_reviews(path)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_other_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good \xff\t1\n")
    with pytest.raises(ValueError, match="a.txt is no text in UTF-8: invalid start byte at byte 5"):
        read_reviews(tmp_path / "a.txt")


def test_lines_end_only_where_a_line_does(tmp_path):
    (tmp_path / "a.txt").write_bytes("so\u0085good  \t1\r\nBad.\t0\nbad\t1\n".encode())
    assert read_reviews(tmp_path / "a.txt") == [("so\u0085good", 1), ("Bad.", 0)]  # the last one is a near copy
    write_reviews(tmp_path / "b.txt", [("a b", 1), ("c", 0)])
    assert read_reviews(tmp_path / "b.txt") == [("a b", 1), ("c", 0)]
    (tmp_path / "b.txt").write_text("\ufeffa b\t1\nc\t0\n")  # as some programs begin a file
    assert read_reviews(tmp_path / "b.txt") == [("a b", 1), ("c", 0)]


def test_splits_share_nothing():
    assert sorted(bucket for buckets in SPLITS.values() for bucket in buckets) == list(range(100))
    reviews = [(f"review number {i}", i % 2) for i in range(500)]
    sides = [of_split(reviews, split) for split in SPLITS]
    assert sorted(sum(sides, [])) == sorted(reviews) and min(map(len, sides)) > 40
    assert split_of("It is so.") == split_of("it IS  so")


def test_halves_of_sentences():
    assert first_halves([("a b c d e f g", 1), ("a b c d e", 0)]) == [("a b c", 1)]


def test_our_own_reviews():
    examples, reviews = (read_reviews(OURS / name) for name in ("examples.txt", "reviews.txt"))
    assert Counter(label for _, label in examples) == {0: 12, 1: 12} and Counter(label for _, label in reviews) == {0: 30, 1: 30}
    shown = {beginning for endings in ENDINGS.values() for beginning in endings}
    assert not shown & {text for text, _ in examples}
    judge = Judge.train(of_split(reviews, "practice", "validation"))
    assert judge.accuracy(of_split(reviews, "practice", "validation")) > 95


def test_the_prompts():
    for name in STEERS:
        texts = [steered(name, towards)("It was") for towards in KINDS]
        assert texts[0] != texts[1] and all(text.endswith("\n" + bare_review("It was")) for text in texts)


def test_the_model_writes_reviews():
    model, tokenizer = tiny_author()
    end_with_line(model, tokenizer)
    examples = [("a bad beginning", 0), ("a good beginning", 1)]
    found = written_reviews(model, tokenizer, examples, 20, "{kind} review", 40)
    assert Counter(label for _, label in found) == {0: 20, 1: 20} and len({text for text, _ in found}) == 40
    assert all(len(text.split()) >= 2 and "\n" not in text for text, _ in found)
    assert found == written_reviews(model, tokenizer, examples, 20, "{kind} review", 40)
    with pytest.raises(ValueError, match="asked for 5 texts after 'Negative review', the model wrote only 0 different ones"):
        written_reviews(model, tokenizer, examples, 5, "{kind} review", 1)


def test_the_file_of_beginnings_is_made(author, monkeypatch, tmp_path, capsys):
    from data import control as program
    monkeypatch.setattr(program, "FILE", tmp_path / "beginnings.txt")
    monkeypatch.setattr(program, "write_beginnings", lambda model, tokenizer, n, **how: write_beginnings(model, tokenizer, 3, **how))
    monkeypatch.setattr(sys, "argv", ["control", str(author)])
    program.main()
    found = read_reviews(tmp_path / "beginnings.txt")
    assert Counter(label for _, label in found) == {0: 3, 1: 3} and "beginnings.txt" in capsys.readouterr().out
    assert not {text for text, _ in found} & {text for text, _ in read_reviews(OURS / "examples.txt")}


# --- forgetting ---


def test_forgetting_by_hand():
    (base, tokenizer), (student, _) = tiny_author(), tiny_author()
    assert kl_to_base(base, student, tokenizer, 8, ["a b", "c"]) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        student.lm_head.weight[5, 0] += 0.3
    prompts = tokenizer.encode_all(["a b", "c"] * 5)  # more than one batch
    texts = generate(base, prompts, 8, generator=torch.Generator().manual_seed(0))
    p, q = (torch.cat(score(model, prompts, texts)).softmax(-1).double() for model in (base, student))
    expected = (p * (p / q).log()).sum(-1).mean().item()
    assert expected > 0.01
    assert kl_to_base(base, student, tokenizer, 8, ["a b", "c"] * 5) == pytest.approx(expected, rel=1e-3)


# --- the experiment ---


def test_the_experiment_from_end_to_end(author, sentences, run, tmp_path, capsys):
    out = tmp_path / "run"
    run("train", "--task", "control", "--model", author, "--data", sentences, "--beginnings", sentences, "--out", out, *SMALL)
    said, record = capsys.readouterr().out, json.loads((out / "record.json").read_text())
    assert record["scale"] == "smollm2" and record["files"].keys() >= {"sentences.txt"}
    assert set(record["metrics"]) == {"judge", "judge_cross_validated", "forgetting", "forgetting_negative", *(
        f"{row}{towards}{where}" for row in ("before", "teacher", "after") for towards in ("", "_negative") for where in ("", "_real"))}
    assert record["metrics"]["judge"]["mean"] == 100 and record["metrics"]["forgetting"]["mean"] >= 0
    assert set(record["steers"]["positive"]) == set(STEERS) and set(record["measures"]["negative"]) == {"written", "real"}
    assert "One practice item" in said and "Towards negative, beginnings of real sentences" in said
    assert "real sentences and reviews of ours, is right about 100.0 % of" in said and "| student before |" in said
    kept = json.loads((out / "positive" / "after.json").read_text())
    assert len(kept["written"]["texts"]) == 6 and set(kept["written"]) == {"share", "entropy", "distinct_2", "rouge", "texts"}

    run("eval", "--task", "control", "--model", out / "positive" / "student", "--device", "cpu", "--max-new-tokens", 5)
    assert "negative beginnings: " in (said := capsys.readouterr().out) and "% end well" in said
    run("eval", "--task", "control", "--model", out, "--ask", "the film was", "--device", "cpu")
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()} >= {
        "positive/student", "negative/student", "its"}
    with pytest.raises(SystemExit, match="is in no run of --task control"):
        run("eval", "--task", "control", "--model", author, "--device", "cpu")


def test_the_models_own_judge(author, run, tmp_path, capsys):
    out = tmp_path / "run"
    run("train", "--task", "control", "--model", author, "--out", out, "--towards", "negative", "--steer", "words", *SMALL)
    record, said = json.loads((out / "record.json").read_text()), capsys.readouterr().out
    assert set(record["metrics"]) == {"before_negative", "teacher_negative", "after_negative", "forgetting_negative", "judge"}
    ours = read_reviews(OURS / "reviews.txt")
    assert record["judged"] == {"trained_on": 20 + len(of_split(ours, "practice", "validation")), "held_out": len(of_split(ours, "test"))}
    assert "texts by the model itself and by us" in said and set(record["steers"]["negative"]) == {"words"}


def test_what_is_tested_was_not_seen(author, sentences, tmp_path):
    """Beginnings are of one split only, and no sentence that trains the judge has its beginning tested."""
    settings = ControlSettings(model=str(author), data=str(sentences), beginnings=str(sentences))
    experiment = Control(settings, 0, RunFolder(tmp_path, torch.device("cpu")))
    experiment.prepare()
    experiment.folder.keep("beginnings", experiment.make_beginnings(), None)
    training, held_out = experiment.judge_reviews()
    assert training and held_out and not set(training) & set(held_out)
    for towards in KINDS:
        tests, wrong = experiment.tests(towards), 1 - KINDS.index(towards)
        sides = [set(experiment.beginnings(towards, split)) for split in SPLITS]
        assert all(sides) and sum(map(len, sides)) == len(set.union(*sides)) and set(tests["written"]) <= sides[0]
        assert sides[0] | sides[1] | sides[2] == set(texts_of(read_reviews(sentences), wrong))
        halves = set(texts_of(first_halves(training), wrong))
        assert tests["real"] and not halves & set(tests["real"])
        assert set(tests["real"]) <= set(texts_of(first_halves(held_out), wrong))


def test_no_real_beginning_is_tested_that_was_practised(author, tmp_path):
    """A file of beginnings may have those of the sentences themselves, whose splits are others."""
    lines = [f"in film {i} the hero of part {i} was {'good' if i % 2 else 'bad'} and so was the end of all that" for i in range(200)]
    (data := tmp_path / "data.txt").write_text("".join(f"{line}\t{i % 2}\n" for i, line in enumerate(lines)))
    halves = first_halves(read_reviews(data))
    (beginnings := tmp_path / "halves.txt").write_text("".join(f"{text.upper()}\t{label}\n" for text, label in halves))
    made = Control(ControlSettings(model=str(author), data=str(data), beginnings=str(beginnings)), 0,
                   RunFolder(tmp_path / "run", torch.device("cpu")))
    made.folder.keep("beginnings", made.make_beginnings(), None)
    for towards in KINDS:
        real = {text.upper() for text in made.tests(towards)["real"]}
        assert real and not real & {*made.beginnings(towards, "practice"), *made.beginnings(towards, "validation")}


@pytest.mark.parametrize("words, sentence", [
    (["--judge", "data"], "--judge data: there are no sentences to train it on; name a file with --data"),
    (["--steer", "shout"], "argument --steer: invalid choice: 'shout'"),
    (["--towards", "neutral"], "argument --towards: invalid choice"),
    (["--data", "nowhere.txt"], "nowhere.txt: No such file"), (["--beginnings", "nowhere.txt"], "nowhere.txt: No such file"),
    (["--samples", "0"], "--samples 0: it must be at least 1")])
def test_a_mistake_is_named(words, sentence, author, run, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run("train", "--task", "control", "--model", author, "--out", tmp_path / "run", "--jobs", 1, "--device", "cpu", *words)
    assert sentence in str(stopped.value)


def test_too_few_beginnings_are_named(author, run, tmp_path):
    write_reviews(tmp_path / "few.txt", [("one two three", 0), ("four five six", 1)])
    with pytest.raises(SystemExit, match="few.txt: 2 beginnings leave none of one kind for"):
        run("train", "--task", "control", "--model", author, "--out", tmp_path / "run", "--jobs", 1, "--device", "cpu",
            "--beginnings", tmp_path / "few.txt")
