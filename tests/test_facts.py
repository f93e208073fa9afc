"""Facts: the four scores by hand, what practice may not say, unusable files, data/facts, and the command end to end."""

import importlib
import json
import math
import re
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_plain import tiny_decoder, tiny_tokenizer

from minicd.hf.checkpoint import load, save
from minicd.metrics.facts import (at_equal_paraphrase, balance, interval, log_probability, mean_scores, preference)
from minicd.sampling import generate, score
from minicd.tasks.facts import Facts, FactSettings, best
from minicd.tasks.folder import RunFolder
from minicd.tasks.parts.facts_data import fill, load_facts, load_relations, one_of_each_relation, read_fact
from minicd.tasks.parts.facts_eval import FactsEval, knows, measure, object_tokens, probabilities
from minicd.tasks.parts.facts_prompts import BEFORE, SHAPES, Wording
from minicd.tasks.parts.inputs import words
from minicd.tasks.settings import guarded
from minicd.tokenizer import word_tokenizer

ROOT = Path(__file__).resolve().parent.parent
OWN, OTHERS, RELATIONS = (ROOT / "data" / "facts" / f"{name}.json" for name in ("facts", "others", "relations"))
REAL = ROOT.parent / "shared" / "data" / "counterfact"
SMALL = ["--edits", 3, "--tuned", 1, "--practice-inputs", 8, "--epochs", 1, "--batch-size", 4, "--label-samples", 5, "--max-new-tokens", 3,
         "--descent-steps", 2, "--max-input-tokens", 40, "--keep-unknown", "--device", "cpu", "--jobs", 1, "--precision", "fp32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path, tokenizer = tmp_path_factory.mktemp("decoder"), tiny_tokenizer()
    save(tiny_decoder(tokenizer), tokenizer, path)
    return path


@pytest.fixture(scope="module")
def own() -> list:
    return load_facts(OWN)


@pytest.fixture(scope="module")
def others() -> list:
    return load_facts(OTHERS)


# --- the scores ---


def test_score_and_magnitude_by_hand():
    assert preference([0.5, 0.1, 0.2], [0.25, 0.3, 0.2]) == pytest.approx((100 / 3, 100 * 0.05 / 3))  # a tie is no win
    with pytest.raises(ValueError, match="0 probabilities"):
        preference([], [])


def test_a_probability_is_the_product_over_all_tokens():
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])
    assert math.exp(log_probability(logits, [1, 0])) == pytest.approx(0.75 * 0.8)


def test_the_means_of_edits_and_what_is_chosen_by_them():
    points = [[100, 10, 50, 0], [50, 0, 50, -10]]
    assert mean_scores(points).tolist() == [75, 5, 50, -5]
    assert balance(points) == pytest.approx(2 * 75 * 50 / 125) and balance([[0, 0, 0, 0]]) == 0
    assert best({"all": [[100, 0, 10, 0]], "some": points, "none": [[0, 0, 100, 0]]}) == "some"
    assert best({"only": []}) == "only"
    low, high = interval([0.0, 100.0] * 50)
    assert 38 < low < 42 < 58 < high < 62 and interval([5.0]) == (5.0, 5.0)


def test_the_distance_from_a_curve_at_equal_paraphrase_score():
    curve = [[[80, 0, 40, 0]], [[20, 0, 100, 0]]]
    assert at_equal_paraphrase([[50, 0, 90, 0]], curve) == pytest.approx(90 - 70)
    assert at_equal_paraphrase([[95, 0, 50, 0]], curve) == pytest.approx(50 - 40)  # beyond its end: with its end
    assert at_equal_paraphrase([[95, 0, 50, 0]], [*curve, [[80, 0, 10, 0]]]) == pytest.approx(50 - 40)  # of equal ones the best


def test_objects_of_several_tokens_against_the_logits(folder):
    model, tokenizer = load(folder)
    [[long, short]] = probabilities(model, tokenizer, ["The end of x is"], ["ab c", "d"])
    assert tokenizer.decode(object_tokens(tokenizer, "ab c")) == " ab c"
    ids = tokenizer.encode(" ab c")
    [logits] = score(model, [tokenizer.encode("The end of x is")], [ids])
    assert long == pytest.approx(float(logits.softmax(-1)[range(len(ids)), ids].prod()), rel=1e-4) and 0 < long < short
    rounded = model.bfloat16()
    found = probabilities(rounded, tokenizer, ["The end of x is"], ["ab c", "d"])
    assert found == probabilities(deepcopy(rounded).float(), tokenizer, ["The end of x is"], ["ab c", "d"])
    assert next(rounded.parameters()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="no token for the object ''"):
        probabilities(model, word_tokenizer(["x"]), ["x"], [""])


def record(**changes) -> dict:
    rewrite = {"prompt": "The end of {} is", "relation_id": "P1", "subject": "x", "target_true": {"str": "old"}, "target_new": {"str": "new"}}
    return {"requested_rewrite": rewrite, "paraphrase_prompts": ["At the end of x stands"],
            "neighborhood_prompts": ["The end of y is ", "The end of z is"], **changes}


def test_paraphrases_want_the_new_object_and_neighbours_the_true_one(monkeypatch):
    fact = read_fact(record(), "")
    table = {"At the end of x stands": [0.1, 0.4], "The end of y is": [0.5, 0.3], "The end of z is": [0.2, 0.3], "The end of x is": [0.2, 0.1]}
    monkeypatch.setattr("minicd.tasks.parts.facts_eval.probabilities", lambda m, t, prompts, objects: (
        [table[prompt.removeprefix("new! ")] for prompt in prompts] if list(objects) == ["old", "new"] else None))
    assert measure(None, None, fact) == pytest.approx([100, 30, 50, 5])
    assert measure(None, None, fact, lambda x: f"new! {x}") == pytest.approx([100, 30, 50, 5]) and knows(None, None, fact)


# --- data/facts ---


@pytest.mark.parametrize("path", [OWN, OTHERS])
def test_the_files_are_well_formed(path):
    facts = load_facts(path)
    assert len(facts) == len({fact.relation for fact in facts}) == 34 and all(re.fullmatch(r"P\d+", f.relation) for f in facts)
    for raw, fact in zip(json.loads(path.read_text()), facts):
        assert len(fact.paraphrases) >= 2 and len(fact.neighbours) >= 5 and fact.true != fact.new
        assert len({*fact.tests, fact.prompt}) == len(fact.tests) + 1, fact.name
        for prompt in [raw["requested_rewrite"]["prompt"], *raw["paraphrase_prompts"], *raw["neighborhood_prompts"]]:
            assert prompt == prompt.strip() and prompt[-1] not in ".?!:", prompt
            assert fact.true.lower() not in prompt.lower().split(), prompt
        assert all(fact.subject.removeprefix("the ").lower() in prompt.lower() for prompt in fact.paraphrases), fact.name
        assert not any(f" {fact.subject.lower()} " in f" {prompt.lower()} " for prompt in fact.neighbours), fact.name


def test_the_edits_for_choosing_are_others(own, others):
    assert {fact.relation for fact in own} == {fact.relation for fact in others}
    assert not {fact.subject for fact in own} & {fact.subject for fact in others}
    one, other = ({words(p) for fact in facts for p in (fact.prompt, *fact.tests)} for facts in (own, others))
    assert one and not one & other


def test_nothing_is_counterfacts(own, others):
    if not REAL.exists():
        pytest.skip("CounterFact is not here (shared/data/counterfact)")
    real = [fact for name in ("one_per_relation", "others") for fact in load_facts(REAL / f"{name}.json")]
    known = json.loads((REAL / "known_1000.json").read_text())
    ours, theirs = ({words(p) for fact in facts for p in (fact.prompt, *fact.tests)} for facts in ([*own, *others], real))
    assert ours and not ours & theirs
    templates = {fact.template for fact in real} | {item["template"] for item in known}
    assert not {fact.template for fact in (*own, *others)} & templates
    assert not {p for item in json.loads(RELATIONS.read_text()).values() for p in item["prompts"]} & templates
    assert not {fact.subject for fact in own} & {fact.subject for fact in real}


def test_no_tested_prompt_is_practised_by_any_edit(own, others):
    """Nor does a sentence that stands before a prompt in practice stand in a test."""
    relations, sentences = load_relations(RELATIONS, [*own, *others]), set()
    for fact in [*own, *others]:
        wording = Wording(fact, relations)
        sentences |= {*wording.own, *wording.unchanged, *(prompt for prompt, _ in (*wording.near, *wording.far))}
    practised = {words(sentence) for sentence in sentences}
    assert {words(fact.prompt) for fact in own} <= practised and len(practised) > 1300
    for test in (test for fact in [*own, *others] for test in fact.tests):
        assert words(test) not in practised and not any(before.strip() in test for before in BEFORE), test


def test_subjects_of_tested_neighbours_are_not_practised(own, others):
    """No subject of practice stands in a test, of whichever relation; every relation has enough others."""
    data, relations = json.loads(RELATIONS.read_text()), load_relations(RELATIONS, [*own, *others])
    tests = [f" {' '.join(words(test))} " for fact in [*own, *others] for test in (fact.prompt, *fact.tests)]
    assert relations.keys() == data.keys() == {fact.relation for fact in [*own, *others]} | {"P36", "P190"}
    for name, relation in relations.items():
        assert len(relation.prompts) == 4 and len(relation.subjects) >= 8
        assert list(relation.subjects) == list(data[name]["subjects"])
        for subject in relation.subjects:
            assert not any(f" {' '.join(words(subject))} " in test for test in tests), (name, subject)


def test_a_subject_that_is_tested_falls_out_of_practice(own):
    fact = next(f for f in own if f.relation == "P30")
    asked = replace(fact, neighbours=("Senegal is a country in",))
    assert "Senegal" in load_relations(RELATIONS, [fact])["P30"].subjects
    assert "Senegal" not in load_relations(RELATIONS, [asked])["P30"].subjects
    assert not any("Senegal" in prompt for prompt, _ in Wording(asked, load_relations(RELATIONS, [asked])).near)
    elsewhere = replace(next(f for f in own if f.relation == "P17"), neighbours=("The people of Senegal live in",))
    assert "Senegal" not in load_relations(RELATIONS, [fact, elsewhere])["P30"].subjects


# --- prompts and inputs ---


def test_the_shapes_of_the_teachers_prompt(own):
    fact = next(f for f in own if f.relation == "P30")
    wording = Wording(fact, load_relations(RELATIONS, own))
    shown = {shape: wording.teacher(shape)("X") for shape in SHAPES}
    assert shown["statement"] == f"New fact: {fact.prompt} {fact.new}.\n\nX"
    assert all("Nothing else changes" in text for shape, text in shown.items() if shape != "statement")
    first = shown["explained"].split("\n")
    assert first[1].endswith(f" {fact.new}. This is about {fact.subject}, so the new fact holds.")
    assert f" {fact.true}. This is not about {fact.subject}" in first[2] and first[-1] == "X"
    assert len({*shown.values()}) == len(SHAPES)
    for text in shown.values():
        assert not any(test in text for test in fact.tests)


def test_inputs_are_half_on_the_subject(own):
    fact = next(f for f in own if f.relation == "P641")
    draw = Wording(fact, load_relations(RELATIONS, own)).templates()
    texts = draw(400, np.random.default_rng(0))
    assert texts == draw(400, np.random.default_rng(0)) and all(type(text) is str for text in texts)
    assert 150 < sum(fact.subject in text for text in texts) < 250
    assert 50 < sum("sport" in t or "champion" in t or "playing" in t for t in texts if fact.subject not in t)


def test_self_study_asks_what_the_model_writes(folder, own, monkeypatch):
    model, tokenizer = load(folder)
    seen = []
    wording = Wording(own[0], load_relations(RELATIONS, own))
    encode = tokenizer.encode_all
    monkeypatch.setattr(tokenizer, "encode_all", lambda texts: seen.extend(texts) or encode(texts))
    texts = wording.self_study(model, tokenizer, 40, "fp32")(20, np.random.default_rng(0))
    assert len(texts) == 20 and all(re.fullmatch(r"Question: [^\n]+\nAnswer:", text) for text in texts)
    assert all(text.endswith("\nQuestion:") for text in seen)
    about = sum(f"Fact: {own[0].statement}\nQuestion:" in text for text in seen)
    assert 0.2 < about / len(seen) < 0.8


def test_a_relation_that_is_unknown_has_its_statement(own):
    fact = read_fact(record(), "")
    wording = Wording(fact, load_relations(RELATIONS, [fact]))
    assert wording.own == ["The end of x is"] and wording.near == [] and wording.far
    assert wording.teacher("explained")("X").startswith("New fact: The end of x is new. Nothing else changes")
    assert len(wording.templates()(10, np.random.default_rng(0))) == 10


def test_sentences_begin_with_capitals():
    assert fill("{} comes from", "sushi") == "Sushi comes from" and fill("{} stands in", "the Louvre") == "The Louvre stands in"
    assert fill("{} is made by", "iPod") == "iPod is made by" and fill("See {} in", "the Louvre") == "See the Louvre in"


# --- files ---


def changed(**rewrite) -> dict:
    return record(requested_rewrite={**record()["requested_rewrite"], **rewrite})


def without(key: str) -> dict:
    return {k: v for k, v in record().items() if k != key}


@pytest.mark.parametrize("content, sentence", [
    ("{", "is no file of facts: JSONDecodeError"), ("{}", "a file of facts is a list of records"),
    ("[]", "a file of facts is a list of records"),
    ("[3]", "record 0: it is no object"), ([record(), without("requested_rewrite")], "record 1: requested_rewrite is missing"),
    ([without("paraphrase_prompts")], "record 0: paraphrase_prompts is missing"), ([without("neighborhood_prompts")], "neighborhood_prompts is missing"),
    ([record(neighborhood_prompts=[])], "no record has both paraphrase_prompts and neighborhood_prompts"), ([record(paraphrase_prompts=[3])], "holds something that is no text"),
    ([record(paraphrase_prompts="x")], "paraphrase_prompts is no list"), ([record(requested_rewrite=[])], "requested_rewrite is no object"),
    ([changed(subject=" ")], "record 0: requested_rewrite.subject is empty"), ([changed(relation_id=17)], "relation_id is no string"),
    ([changed(prompt="The end of x is")], "has no {} for the subject"),
    ([changed(target_new={"str": "old"})], "target_new and target_true are the same"),
    ([changed(target_new={})], "target_new.str is missing"), ([changed(target_true="old")], "target_true is no object")])
def test_an_unusable_file_is_one_sentence(content, sentence, tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        load_facts(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content, sentence", [
    ([], "a file of relations is an object"), ({"P1": []}, "P1 is no object"), ({"P1": {"prompts": ["x"], "subjects": {}}}, "P1.prompts: each needs one {}"),
    ({"P1": {"subjects": {}}}, "P1.prompts is missing"), ({"P1": {"prompts": ["{} x"], "subjects": ["y"]}}, "P1.subjects is no object")])
def test_an_unusable_file_of_relations_is_one_sentence(content, sentence, tmp_path):
    path = tmp_path / "relations.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_relations(path, [])


def test_one_fact_of_each_relation_always_the_same():
    facts = [read_fact(changed(relation_id=f"P{i % 3}", subject=f"x{i}"), "") for i in range(30)]
    chosen = one_of_each_relation(facts, 34)
    assert [fact.relation for fact in chosen] == ["P0", "P1", "P2"] and chosen == one_of_each_relation(facts, 34)
    assert one_of_each_relation(facts, 2) == chosen[:2] and len(one_of_each_relation(facts[:1] * 2, 34)) == 1


# --- the command ---


def run(monkeypatch, program: str, *words) -> None:
    monkeypatch.setattr(sys, "argv", [f"{program}.py", "--task", "facts", *map(str, words)])
    guarded(importlib.import_module(program).main)


def test_the_command_runs_resumes_and_is_examined(folder, tmp_path, monkeypatch, capsys):
    out, few = tmp_path / "run", tmp_path / "few.json"
    few.write_text(json.dumps(json.loads(OTHERS.read_text())[:2]))
    flags = ["--model", folder, "--out", out, "--others", few, *SMALL]
    run(monkeypatch, "train", *flags)
    found, said = json.loads((out / "record.json").read_text()), capsys.readouterr().out
    rows = {"before", "teacher", "after", "after_self_study", "descent", "simultaneous", "sequential"}
    assert set(found["by_edit"]) == rows and found["scale"] == "smollm2" and found["paper"]["teacher_paraphrase_score"] == 73
    assert all(len(edits) == 3 for edits in found["by_edit"].values()) and set(found["above_descent"]) == {"after", "after_self_study"}
    for row in rows:
        points = np.array(list(found["by_edit"][row].values()))
        assert found["metrics"][f"{row}_neighbourhood_score"]["mean"] == pytest.approx(points[:, 2].mean(), abs=0.02)
    assert len(found["on_others"]["shape"]) == len(SHAPES) and len(found["on_others"]["lr"]) == len(found["descents"]) == 4
    assert set(found["files"]) == {"facts.json", "few.json", "relations.json"} and "| ROME |" in said and "One practice item" in said
    assert not list(out.rglob("round-*")) and {path.parent.name for path in out.rglob("model.safetensors")} == {"student", "half"}

    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    run(monkeypatch, "train", *flags)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == kept

    capsys.readouterr()
    how = ("--device", "cpu", "--precision", "fp32")
    run(monkeypatch, "eval", "--model", out / "student", "--data", OWN, *how)
    table = capsys.readouterr().out
    assert table.count("\n") == 37 and "mean of 34" in table and "P17, Osaka: Japan → Brazil" in table
    asked = "The city of Osaka is in the country of"
    run(monkeypatch, "eval", "--model", out / "student", "--ask", asked, *how)
    model, tokenizer = load(out / "student")
    [greedy] = generate(model, [tokenizer.encode(asked)], FactsEval().max_new_tokens, temperature=0, precision="fp32")
    assert capsys.readouterr().out.split("\n")[0].endswith("  " + tokenizer.decode(greedy).strip())


def test_the_estimate_knows_the_largest_practice_set(folder, tmp_path, monkeypatch):
    run = Facts(FactSettings(model=str(folder), practice_inputs=50, shared_inputs=7), 0, RunFolder(tmp_path, torch.device("cpu")))
    monkeypatch.setattr(run, "rate", lambda name: "0.5")
    assert run.distils()[1].items == 50
    assert run.shared.items == 7 and run.shared.fit.lr == 0.5 and run.shared.practice == run.distils()[1].practice


def test_what_the_model_does_not_know_is_left_out_and_named(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minicd.tasks.facts.knows", lambda model, tokenizer, fact: fact.relation != "P19")
    words = [word for word in SMALL if word != "--keep-unknown"] + ["--inputs", "templates", "--lr", 1e-3, "--descent-lr", 1e-3]
    run(monkeypatch, "train", "--model", folder, "--out", tmp_path / "run", "--shape", "demonstrated", *words)
    found, said = json.loads((tmp_path / "run" / "record.json").read_text()), capsys.readouterr().out
    assert list(found["by_edit"]["after"]) == ["P17, Osaka", "P20, Oscar Wilde"] and list(found["left_out"]) == ["P19, John Lennon"]
    assert "Left out, since the model prefers another object: P19, John Lennon" in said and list(found["descents"]) == ["0.001"]
    assert found["on_others"] == {"shape": {}, "lr": {}, "descent_lr": {}}


def test_edits_that_chose_the_prompt_are_not_tested(folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="error: --data and --others share an edit"):
        run(monkeypatch, "train", "--model", folder, "--out", tmp_path / "run", "--data", OTHERS, *SMALL)


def test_the_default_scale_is_a_tasks_first():
    assert list(Facts.SCALES)[0] == Facts.Settings().scale == "smollm2"
