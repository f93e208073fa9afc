"""`--task own`: held-out inputs, measures against plain arithmetic, whole runs on the pocket bases, clear refusals."""

import importlib
import json
import re
import shutil
import sys
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import tiny_t5
from test_plain import tiny_decoder, tiny_tokenizer

from minicd.distill import Context
from minicd.hf.chat import Chat
from minicd.hf.checkpoint import load, save
from minicd.runtime import files
from minicd.t5 import initialise
from minicd.tasks import own
from minicd.tasks.folder import RunFolder
from minicd.tasks.parts import inputs, own_forgetting, own_measures
from minicd.tasks.parts.contexts_file import read_contexts
from minicd.tasks.parts.inputs import pool, words
from minicd.tasks.settings import guarded
from minicd.tokenizer import word_tokenizer

ROOT = Path(__file__).resolve().parents[1]
EVERY = sorted((ROOT / "data" / "contexts").glob("*.toml"))
REAL = [file for file in EVERY if read_contexts(file).model == "data/smollm2"]
FILES = [file for file in EVERY if file not in REAL]
SMALL = ["--practice-inputs", "24", "--epochs", "1", "--max-new-tokens", "24", "--most-tests", "6", "--jobs", "1", "--device",
         "cpu", "--precision", "fp32"]
WORDS = word_tokenizer([*"abcdefgh", "#"])
HOW = SimpleNamespace(max_new_tokens=4, precision="fp32")


@pytest.fixture
def run(monkeypatch, capsys):
    """What train.py or eval.py prints, or its one sentence."""
    def call(program: str, *words) -> str:
        monkeypatch.setattr(sys, "argv", [f"{program}.py", "--task", "own", *map(str, words)])
        capsys.readouterr()
        try:
            guarded(importlib.import_module(program).main)
        except SystemExit as stopped:
            assert len(str(stopped.code).splitlines()) == 1
            return stopped.code
        return capsys.readouterr().out
    return call


def contexts(folder: Path, **changes: str) -> Path:
    keys = {"teacher": '"reverse : {input}"', "student": '"task : {input}"', "answer": '"everything"',
            "inputs": json.dumps([f"{a} {b} {c}" for a in "abcd" for b in "abcd" for c in "abcdef"]), **changes}
    (folder / "my.toml").write_text("[contexts.mine]\n" + "\n".join(f"{key} = {value}" for key, value in keys.items()))
    return folder / "my.toml"


# --- inputs ---


@pytest.mark.parametrize("n, held", [(2, 1), (3, 1), (60, 30), (100, 50), (120, 50), (600, 60), (5000, 500)])
def test_held_out_inputs_are_never_practised(n, held):
    texts = [f"question {i}" for i in range(n)]
    tests, validation, practised = own.split(texts)
    assert len(tests) == held and len(validation) == min(own.VALIDATED, (n - held) // 5)
    assert sorted([*tests, *validation, *practised]) == sorted(texts), "each in one part"
    assert own.split(texts[::-1]) == (tests, validation, practised), "the order in the file does not matter"


def test_tests_of_ones_own_are_never_practised(tmp_path):
    named = read_contexts(contexts(tmp_path, tests='["A b", "x"]')).contexts["mine"]
    tests, validation, practised = own.split(["a b.", *"cdefgh"], named)
    assert tests == ["A b", "x"] and len(validation) == 1 and sorted([*validation, *practised]) == [*"cdefgh"]


def test_copies_count_once():
    assert own.distinct(["A b", "c", "a  B", "c"]) == ["A b", "c"]


def test_a_run_practises_nothing_that_it_tests(tmp_path):
    settings = own.OwnSettings(contexts=str(contexts(tmp_path)))
    experiment = own.Own(settings, 0, SimpleNamespace(device=torch.device("cpu"), get=lambda stage: {"texts": {"mine": texts}}))
    texts = experiment.file.contexts["mine"].source.texts
    drawn = experiment.practised("mine").inputs(2000, np.random.default_rng(0))
    assert settings.model == "data/pocket" and set(drawn) == set(own.split(texts)[2])


def test_the_model_writes_inputs(monkeypatch):
    written = iter([["c\nd", "a", "b b", "C\nD", "e"], ["f", "g", "h"]])
    def generate(model, prompts, *how, **more):
        texts = next(written)[: len(prompts)]
        return [WORDS.backend.encode(t.replace("\n", " "), add_special_tokens=False).ids for t in texts], [
            "length" if t == "e" else "stop" for t in texts]
    monkeypatch.setattr(inputs, "generate", generate)
    found = own_measures.write_inputs(tiny_t5(len(WORDS)), WORDS, ["a", "b"], 5, (0, 0), "fp32")
    assert found == ["a", "b", "c d", "b b", "f", "g", "h"], "no copies, and nothing unfinished"
    monkeypatch.setattr(inputs, "generate", lambda model, prompts, *how, **more: ([[3]] * len(prompts), ["stop"] * len(prompts)))
    with pytest.raises(ValueError, match="asked for 5 inputs, the model wrote only 0 new ones"):
        own_measures.write_inputs(tiny_t5(len(WORDS)), WORDS, ["a", "b"], 5, (0, 0), "fp32")


# --- measures ---


def test_intervals():
    value, low, high = own_measures.share([True] * 50)
    assert value == high == 100 and 90 < low < 95, "Wilson's interval is no point"
    assert own_measures.share([True, False])[0] == 50
    value, low, high = own_measures.ratio([1, 2, 9], [1, 2, 3], 10)
    assert value == 20 and 10 <= low < 20 < high <= 30
    assert own_measures.ratio([], []) == [0, 0, 0]


def along(base, model, extract, teachers=("a {}", "b {}")):
    context = Context(pool(["c"]), [lambda x, t=t: t.format(x) for t in teachers], lambda x: x, extract)
    answers = own_measures.teacher_answers(base, WORDS, context, ["c d", "e", "f g h"], HOW)
    return context, answers, own_measures.along_teacher(base, model, WORDS, context, ["c d", "e", "f g h"], answers, HOW)


def test_divergence_along_the_teachers_answers_is_the_plain_sum():
    base, model, sums, same, n = tiny_t5(len(WORDS)), tiny_t5(len(WORDS), seed=1), [], 0, 0
    context, answers, found = along(base, model, lambda y: slice(1, None) if len(y) > 1 else None)
    assert any(answers)
    for x, answer in zip(["c d", "e", "f g h"], answers):
        y = torch.tensor([answer.completion if answer else [0]])
        for t in range(*(answer.kept.indices(len(answer.completion)) if answer else (0, 0, 1))):
            p = sum(base(torch.tensor([WORDS.encode(f(x))]), y)[0, t].softmax(-1) for f in context.teachers) / 2
            q = model(torch.tensor([WORDS.encode(x)]), y[:, answer.kept])[0, t - answer.kept.start].softmax(-1)
            sums.append((p * (p / q).log()).sum().item())
            same, n = same + int(p.argmax() == q.argmax()), n + 1
    assert found["kl"][0] == pytest.approx(1000 * sum(sums) / n, rel=1e-3)
    assert found["agreement"][0] == pytest.approx(100 * same / n)


def test_a_model_is_no_way_from_itself():
    model = tiny_t5(len(WORDS))
    _, _, found = along(model, model, lambda y: slice(None), teachers=("{}",))
    assert found["kl"][0] == pytest.approx(0, abs=1e-6) and found["agreement"] == [100, 100, 100]
    same = own_forgetting.forgotten(model, model, WORDS, ["a b", "c"], HOW)
    other = own_forgetting.forgotten(model, tiny_t5(len(WORDS), seed=1), WORDS, ["a b", "c"], HOW)
    assert same["forgotten"][0] == pytest.approx(0, abs=1e-6) and other["forgotten"][0] > 0.001


def test_what_is_unrelated(tmp_path, monkeypatch, capsys):
    """The file's; else the bare inputs, but where students answer these; else prompts whose words the model knows."""
    file, model, asked = read_contexts(contexts(tmp_path)), tiny_t5(len(WORDS)), []
    texts = {"mine": file.contexts["mine"].source.texts}
    monkeypatch.setattr(own_forgetting, "forgotten", lambda base, model, tokenizer, prompts, how: asked.append(prompts) or {"forgotten": [0]})
    how = SimpleNamespace(**vars(HOW), most_tests=3)

    def prompts(file, other=True):
        own.measure(file, texts, model, tiny_t5(len(WORDS)) if other else model, WORDS, None, how)
        return asked.pop() if asked else None
    assert prompts(file) == own.split(texts["mine"])[0] and prompts(file, other=False) is None
    assert prompts(replace(file, unrelated=["x"])) == ["x"]
    assert own.bare_prompts(["x"], Chat("<{{ messages[0].content }}>"), file) == ["<x>"]
    bare = read_contexts(contexts(tmp_path, student='"{input}"'))
    assert prompts(bare) is None and "it has no unrelated prompts" in capsys.readouterr().out
    monkeypatch.setattr(own_forgetting, "NEUTRAL", ["a b"])
    assert prompts(bare) == ["a b"]


def test_the_pockets_tasks_show_what_its_student_forgot(monkeypatch):
    some = own_forgetting.task_prompts()[::6]
    monkeypatch.setattr(own_forgetting, "task_prompts", lambda: some)
    model, tokenizer = load(ROOT / "data" / "pocket-instructions")
    how = SimpleNamespace(max_new_tokens=8, precision="fp32")
    found = own_forgetting.measure(model, model, tokenizer, own_forgetting.others(tokenizer), how)
    assert {*found} == {"tasks"} and found["tasks"][1] <= found["tasks"][0] <= found["tasks"][2]
    other = own_forgetting.measure(model, initialise(deepcopy(model), 1), tokenizer, own_forgetting.others(tokenizer)[:4], how)
    assert other["tasks"][0] < found["tasks"][0] and other["forgotten"][0] > 0
    assert not own_forgetting.is_pocket(WORDS) and own_forgetting.others(WORDS) == []


# --- whole runs ---


def test_a_run_is_made_measured_and_measured_again(run, tmp_path, monkeypatch):
    losses, rounds = [], own.rounds
    monkeypatch.setattr(own, "rounds", lambda *args, **more: losses.append(args[3].fit.loss) or rounds(*args, **more))
    file, out = contexts(tmp_path), tmp_path / "run"
    said = run("train", "--contexts", file, "--out", out, "--stop-at-best", "--supervised", *SMALL)
    assert "teacher prompt    reverse : " in said and "student prompt    task : " in said
    record = json.loads((out / "record.json").read_text())
    shown = record["item"].split("Answers to test inputs")[1]
    assert [line[2:20].strip() for line in shown.split("\n") if line[:3].strip()] == [
        "input", "base with prompt", "base", "student", "supervised"] * own.SHOWN
    assert shown in said
    rows = record["measures"]["after"]["mine"]
    assert {"kl", "agreement", "identical", "rouge", "milliseconds", "tokens_saved"} <= set(rows) and "exact" not in rows
    assert rows["identical"][1] <= rows["identical"][0] <= rows["identical"][2] and record["files"]
    assert record["metrics"]["mine, kl, after"]["values"][0] < record["metrics"]["mine, kl, before"]["values"][0]
    assert "| before | after | supervised |" in said and set(record["measures"]) == {"before", "after", "supervised"}
    assert re.fullmatch(r"\d+\.\d\d → \d+\.\d\d nat a token from the teacher \(on its text alone .*\)", own.Own.headline(record))
    assert losses == ["empirical", "hard"] and "mine, kl, supervised" in record["metrics"]
    [(start, kl), (step, _)] = record["curve"]["mine"]
    assert (start, step) == (0, 1) and kl > 0 and (out / "own-pocket.png").exists() == bool(find_spec("matplotlib"))
    assert load(out / "student")[0].config == load(ROOT / "data" / "pocket")[0].config
    again = run("eval", "--model", out / "student", "--device", "cpu", "--precision", "fp32")
    assert re.search(r"KL\(teacher ‖ student\).*", again)[0].split("|")[1].strip() == own_measures.cell(rows["kl"])
    assert "| this model |" in again
    file.write_text(file.read_text() + "\n")
    again = run("train", "--contexts", file, "--out", out, "--stop-at-best", "--supervised", *SMALL)
    assert "is not as it was when this run began" in again


def test_inputs_that_changed_since_the_run_began_are_noticed(tmp_path):
    lines, file = tmp_path / "lines.txt", contexts(tmp_path, inputs='"lines.txt"')
    lines.write_text("".join(f"{a} {b}\n" for a in "abcd" for b in "abcd"))
    settings = own.OwnSettings(contexts=str(file), model=str(ROOT / "data" / "pocket"), precision="fp32")

    def begun() -> own.Own:
        return own.Own(settings, 0, RunFolder(tmp_path / "run", torch.device("cpu")))
    begun().make(next(begun().stages()))
    begun().prepare()
    lines.write_text("a b\nb a\n")
    with pytest.raises(ValueError, match="my.toml: contexts.mine.inputs: they are not those with which this run began"):
        begun().prepare()


def test_a_run_that_is_killed_at_ten_moments_ends_as_one_that_is_not(run, tmp_path, monkeypatch):
    base, out, moments, replaced = tmp_path / "base", tmp_path / "run", [], files.os.replace
    save(tiny_t5(len(WORDS)), WORDS, base)
    words = ["train", "--contexts", contexts(tmp_path), "--model", base, "--stop-at-best", "--save-every", "0", "--chunk", "8",
             "--batch-size", "2", "--label-samples", "5", *SMALL, "--max-new-tokens", "4", "--curve-every", "10"]

    def then_copy(source, target) -> None:
        replaced(source, target)
        if out in Path(target).parents:
            moments.append(shutil.copytree(out, tmp_path / f"moment-{len(moments)}"))
    with monkeypatch.context() as watched:
        watched.setattr(files.os, "replace", then_copy)
        assert "Everything is in" in run(*words, "--out", out)
    assert len(moments) > 10
    for moment in moments[:: -(-len(moments) // 10)]:
        assert "Everything is in" in run(*words, "--out", moment)
        for name in ("student/model.safetensors", "inputs.json"):
            assert (moment / name).read_bytes() == (out / name).read_bytes(), moment
        ours, theirs = (json.loads((folder / "record.json").read_text()) for folder in (moment, out))
        assert ours["curve"] == theirs["curve"] and ours["measures"]["after"]["mine"]["kl"] == theirs["measures"]["after"]["mine"]["kl"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_worked_files_run(run, tmp_path, file):
    said = run("train", "--contexts", file, "--out", tmp_path, "--quick", *SMALL)
    name, = read_contexts(file).contexts
    assert "held out" not in said and "no such" not in said and "unrelated" in said
    teacher = json.loads((tmp_path / "record.json").read_text())["measures"]["after"][name]["teacher_exact"]
    assert teacher[0] >= 50, "the base does under the teacher's prompt what the references say"


def test_there_are_six_worked_files():
    assert {"examples", "instruction", "scratchpad"} <= {file.stem for file in FILES}
    assert {"company", "place", "think"} <= {file.stem for file in REAL}
    for file in FILES:
        model, tokenizer = load(ROOT / read_contexts(file).model)
        for named in read_contexts(file).contexts.values():
            prompts = [named.teachers[0].replace("{input}", named.source.texts[0]), *named.source.texts[:50]]
            assert not [word for prompt in prompts for word in tokenizer.unknown_words(prompt)]


@pytest.mark.parametrize("file", REAL, ids=lambda file: file.stem)
def test_files_for_the_real_model(file):
    """Their worked answers keep their rules, and none of their worked questions is tested."""
    found = read_contexts(file)
    for named in found.contexts.values():
        worked = re.findall(r"(?:^|\n)(?:Customer|Question|Problem): (.*)\n(?:Reply|Answer|Thought): (.*)", named.teachers[0])
        assert found.plain and 4 <= len(worked) <= 5
        answers = [answer.split("Answer: ")[-1] for _, answer in worked]
        assert all(all(hits) for hits in own_measures.kept(named.rules, answers).values())
        tests, validation, practised = own.split(named.source.texts, named)
        assert len(tests) >= 40 and (named.source.write or len(tests) + len(validation) + len(practised) >= 200)
        assert not {words(question) for question, _ in worked} & {*map(words, tests)}
        page = named.teachers[0].split("\n\n")[0] if named.source.self_study else ""
        for x in tests if page else ():
            assert any(set(words(answer)) <= set(words(page)) or answer.isdigit() for answer in named.references[x])


def test_word_problems_are_solved():
    solved = read_contexts(ROOT / "data" / "contexts" / "think.toml").contexts["think"].references
    for question, [answer] in solved.items():
        a, b, c = map(int, re.findall(r"\d+", question))
        less = re.search("loses|away|to a friend", question)
        assert a + b + (-c if less else c) == int(answer) >= 0


def test_self_study_reads_the_page_while_it_writes(tmp_path):
    source = '{examples = ["a b", "c d", "e f"], write = 5, self_study = true}'
    named = read_contexts(contexts(tmp_path, teacher='"The page.\\n\\nQ: a b\\nA: c\\n\\nQ: {input}\\nA:"', inputs=source)).contexts["mine"]
    assert named.study(["c d", "e f"]) == "The page.\n\nQ: a b\nA: c\n\nQ: c d\nQ: e f\nQ:"


def test_a_plain_model_studies_a_page(run, tmp_path):
    """It writes questions, keeps rules or not, and can be measured outside its run, since the file has tests."""
    save(tiny_decoder(tiny_tokenizer()), tiny_tokenizer(), tmp_path / "base")
    source = json.dumps([f"{a}b" for a in "abcdefghij"])
    file = contexts(tmp_path, teacher='"a page.\\nQ: {input}\\nA:"', student='"Q: {input}\\nA:"', tests='["xy", "yz", "zx"]',
                    inputs=f"{{examples = {source}, write = 20, self_study = true}}", rules='{never = ["a"]}')
    file.write_text(f"plain = true\nunrelated = ['b:']\nmodel = {json.dumps(str(tmp_path / 'base'))}\n" + file.read_text())
    out = tmp_path / "run"
    said = run("train", "--contexts", file, "--out", out, *SMALL, "--max-new-tokens", 5, "--curve-every", 0)
    written = json.loads((out / "inputs.json").read_text())["texts"]["mine"]
    measured = json.loads((out / "record.json").read_text())["measures"]["after"]
    assert 12 <= len(written) <= 30 and not any("\n" in text for text in written)
    assert {"never", "teacher_never"} <= {*measured["mine"]} and "rules" not in measured["mine"] and "| rule kept:" in said
    assert load(out / "student")[0].config.more_eos_token_ids, "as it was practised, so it is saved"
    shutil.copytree(out / "student", tmp_path / "elsewhere")
    again = run("eval", "--model", tmp_path / "elsewhere", "--contexts", file, "--device", "cpu", "--precision", "fp32",
                "--max-new-tokens", 5)
    assert own_measures.cell(measured["mine"]["kl"]) in again and own_measures.cell(measured["unrelated"]["forgotten"]) in again


def test_rules_kept_are_counted(tmp_path):
    rules = '{ends_with = "ok", never = ["Sorry"], pattern = "^[A-Z]"}'
    named = read_contexts(contexts(tmp_path, rules=rules)).contexts["mine"]
    found = own_measures.kept(named.rules, ["A ok", "a ok", "So sorry ok", "B"])
    assert found == {"ends_with": [True, True, True, False], "never": [True, True, False, True],
                     "pattern": [True, False, True, True], "rules": [True, False, False, False]}
    assert own_measures.kept({}, ["a"]) == {} and {*found} == {*own_measures.RULES}


def test_answers_of_a_plain_model_end_with_their_line(tmp_path):
    tokenizer = tiny_tokenizer()
    [line] = tokenizer.encode("\n")
    model, file = tiny_decoder(tokenizer), contexts(tmp_path)
    own.end_plainly(read_contexts(file), model, tokenizer)
    assert line not in model.config.more_eos_token_ids
    file.write_text("plain = true\n" + file.read_text())
    own.end_plainly(read_contexts(file), model, tokenizer)
    assert line in model.config.more_eos_token_ids
    with pytest.raises(ValueError, match="my.toml: plain is for decoders"):
        own.end_plainly(read_contexts(file), tiny_t5(len(WORDS)), WORDS)


def test_one_can_talk_to_a_model(run, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("builtins.input", lambda prompt: lines.pop(0) if lines else "")
    how = ["--model", ROOT / "data" / "pocket", "--device", "cpu", "--precision", "fp32", "--chat"]
    lines += ["copy : a b c", "reverse : a b c"]
    assert run("eval", *how).splitlines()[1:3] == ["a b c", "c b a"]
    lines += ["a b c"]
    file = contexts(tmp_path, student='"copy : {input}"')
    assert run("eval", *how, "--contexts", file).splitlines()[1] == "a b c"
    lines += ["a b c"]
    assert run("eval", *how, "--contexts", file, "--teacher").splitlines()[1] == "c b a"
    assert "--context your: " in run("eval", *how, "--contexts", file, "--context", "your")
    for words in (["--teacher"], ["--context", "one"]):
        assert "--teacher and --context go with --chat or --ask" in run("eval", *how[:-1], "--contexts", file, *words)
    how[-1:] = ["--ask", "a b c"]
    assert run("eval", *how, "--contexts", file) == "a b c\n" and run("eval", *how, "--contexts", file, "--teacher") == "c b a\n"
    how[-1] = "reverse : a b c"
    assert run("eval", *how) == "c b a\n", "bare, without a file"


def test_a_chat_model_is_asked_through_the_template_that_its_tokenizer_carries(tmp_path):
    words = word_tokenizer(["a"])
    assert Chat.of_tokenizer(words) is None
    words.files = {"tokenizer_config.json": json.dumps({"eos_token": "</s>", "chat_template":
                                                        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ eos_token }}"}).encode()}
    file = contexts(tmp_path, student='[{role = "user", content = "so {input}"}]')
    spoken = own.spoken_to(own.OwnEval(contexts=str(file)), Chat.of_tokenizer(words))
    assert spoken("a") == "<user>so a</s>" and own.spoken_to(own.OwnEval(), Chat.of_tokenizer(words))("a") == "<user>a</s>"


def test_each_worked_file_for_the_real_model_has_a_preset():
    for name, how in own.WORKED.items():
        settings = own.OwnSettings(**own.Own.SCALES[name])
        assert read_contexts(settings.contexts).model == settings.model == "data/smollm2"
        assert settings.practice_inputs == how["practice_inputs"]


# --- refusals ---


@pytest.mark.parametrize("changes, problem", [
    ({"answer": '{after = "Final"}'}, "contexts.mine.answer: it is found in only 0 of 6 answers"),
    ({"inputs": '["a", "A "]'}, "contexts.mine.inputs: there must be two different inputs"),
    ({"student": '[{role = "user", content = "{input}"}]'}, "contexts.mine: it has chat messages, but the model's folder"),
    ({"student": '"x"'}, "contexts.mine.student: it has no {input}")])
def test_what_cannot_be_distilled_is_one_sentence(run, tmp_path, changes, problem):
    said = run("train", "--contexts", contexts(tmp_path, **changes), "--out", tmp_path / "run", *SMALL)
    assert said.startswith("error: ") and "my.toml" in said and problem in said
    assert not (tmp_path / "run" / "student").exists()


def test_flags_that_are_missing_or_name_nothing(run, tmp_path):
    assert "--contexts is missing" in run("train", "--out", tmp_path / "run")
    assert "none.toml cannot be read: No such file" in run("train", "--contexts", tmp_path / "none.toml", "--out", tmp_path / "run")
    assert "--contexts is missing" in run("eval", "--model", ROOT / "data" / "pocket")


def test_a_model_that_is_not_there_is_named_with_the_file(run, tmp_path):
    path = contexts(tmp_path)
    path.write_text('model = "data/nowhere"\n' + path.read_text())
    said = run("train", "--contexts", path, "--out", tmp_path / "run", *SMALL)
    assert said.startswith(f"error: {path}: model: ") and "data/nowhere is not a folder with a model" in said


def test_words_that_the_model_does_not_know_are_pointed_out(run, tmp_path):
    told = run("train", "--contexts", contexts(tmp_path, teacher='"swap : {input}"'), "--out", tmp_path / "run", *SMALL)
    assert "unknown words     'swap'" in told


def test_few_inputs_and_a_system_prompt_of_the_template_are_pointed_out(run, tmp_path, capsys):
    told = run("train", "--contexts", contexts(tmp_path, inputs='["a b", "b c", "d a"]'), "--out", tmp_path / "run", *SMALL)
    assert "my.toml: contexts.mine.inputs: 3 different inputs are few; of these 1 are held out" in told
    polite = Chat("{% if messages[0].role != 'system' %}[system] Be polite. {% endif %}{% for m in messages %}[{{ m.role }}] "
                  "{{ m.content }}{% endfor %}")
    path = contexts(tmp_path, student='[{role = "user", content = "{input}"}]')
    own.tell_system(polite, read_contexts(path).contexts["mine"], {})
    assert "contexts.mine.student: the model's chat template adds a system prompt" in capsys.readouterr().out
    own.tell_system(Chat("[user] {{ messages[0].content }}"), read_contexts(path).contexts["mine"], {})
    assert not capsys.readouterr().out


def test_a_prompt_longer_than_the_window(tmp_path):
    named = read_contexts(contexts(tmp_path)).contexts["mine"]
    model = SimpleNamespace(config=SimpleNamespace(max_positions=12))
    context = named.context(pool(["a"]), WORDS, None, {})
    own.check_window(named, context, ["a b c"], model, WORDS, 6)
    with pytest.raises(ValueError, match=r"my.toml: contexts.mine.teacher: its longest prompt has 6 tokens, which with 7 of .* 12"):
        own.check_window(named, context, ["a b c"], model, WORDS, 7)
