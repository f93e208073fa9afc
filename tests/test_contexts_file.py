"""Contexts files: what they say becomes contexts, and what is wrong in them one sentence with file and key."""

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minicd.distill import identity
from minicd.hf.chat import Chat
from minicd.tasks.parts.contexts_file import Place, Span, read_answer, read_contexts
from minicd.tasks.parts.inputs import pool
from minicd.tokenizer import Rendered, TextTokenizer, word_tokenizer

TOML = """
model = "data/pocket"
rounds = [["one"], ["two", "one"]]
recursive = true
unrelated = ["copy : a"]
template = {enable_thinking = false}

[contexts.one]
teacher = "reverse : {input} {"
student = "task : {input}"
inputs = "words.txt"
answer = {after = "#"}

[contexts.two]
teachers = [[{role = "system", content = "Be brief."}, {role = "user", content = "{input}"}], "{input} !"]
inputs = {file = "rows.jsonl", field = "q", reference = "a"}
"""
CONTEXTS = Path(__file__).resolve().parents[1] / "data" / "contexts"
WORDS = word_tokenizer([*"abcdef", "#", "Answer:", "reverse", ":"])
CHAT = Chat("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ enable_thinking }}")


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "words.txt").write_text("a b\n\n c d \r\n")
    (tmp_path / "rows.jsonl").write_text('{"q": "a", "a": ["b", "c"]}\n{"q": "b", "a": "é"}\n')
    (tmp_path / "my.toml").write_text(TOML)
    return tmp_path / "my.toml"


def test_a_file_becomes_contexts(file):
    found = read_contexts(file)
    assert (found.rounds, found.recursive, found.model) == ([["one"], ["two", "one"]], True, "data/pocket")
    one, two = (found.contexts[name].context(pool(["a"]), WORDS, CHAT, found.variables) for name in ("one", "two"))
    assert (one.teachers[0]("a b"), one.student("a b")) == ("reverse : a b {", "task : a b")
    assert one.extract(WORDS.backend.encode("a # b").ids[:-1]) == slice(2, 3)
    assert [teacher("a") for teacher in two.teachers] == ["<system>Be brief.<user>aFalse", "a !"]
    assert two.student("a") == "<user>aFalse" and isinstance(two.student("a"), Rendered), "bare, thinking as the teacher"
    assert two.extract is identity and two.inputs(2, np.random.default_rng(0)) == ["a", "a"]
    assert found.contexts["one"].source.texts == ["a b", "c d"] and found.unrelated == ["copy : a"]
    assert found.contexts["two"].source.references == {"a": ["b", "c"], "b": ["é"]}
    (file.parent / "rows.jsonl").write_text('{"q": "7 * 6", "a": 42}\n')
    assert read_contexts(file).contexts["two"].source.references == {"7 * 6": ["42"]}


def test_json_is_the_same(file):
    (file.parent / "my.json").write_text(json.dumps(tomllib.loads(TOML)))
    one, two = read_contexts(file), read_contexts(file.parent / "my.json")
    assert one.rounds == two.rounds and one.contexts["two"].teachers == two.contexts["two"].teachers


def test_messages_need_a_chat_template(file):
    named = read_contexts(file).contexts["two"]
    with pytest.raises(ValueError, match="my.toml: contexts.two: it has chat messages, but .* no chat template"):
        named.context(pool(["a"]), WORDS, None, {})
    with pytest.raises(ValueError, match="my.toml: contexts.two: the chat template cannot render.*: no system"):
        named.context(pool(["a"]), WORDS, Chat("{{ raise_exception('no system') }}"), {}).teachers[0]("a")


@pytest.mark.parametrize("old, new, problem", [
    ("[contexts.one]\nteacher", "[contexts.one]\ntaecher", "contexts.one: unknown key 'taecher'; did you mean teacher?"),
    ("contexts.one]", "contexts.unrelated]", "contexts.unrelated: it needs another name: this is that of the unrelated prompts"),
    ("recursive", "recursiv", "unknown key 'recursiv'; did you mean recursive?"),
    ("reverse : {input}", "reverse : {inputs}", "contexts.one.teacher: it has no {input}"),
    ('content = "{input}"', 'content = "input"', "contexts.two.teachers[0]: it has no {input}"),
    ('content = "Be brief."', "content = 7", "contexts.two.teachers[0][0].content: it must be a text"),
    ('"words.txt"', '"word.txt"', "did you mean words.txt?"), ('"words.txt"', '"my/words.txt"', "there is no file"),
    ('"words.txt"', "7", "contexts.one.inputs: it must be a table"), ('"words.txt"', "[]", "contexts.one.inputs: it must be a list"),
    ('"words.txt"', '{examples = ["a"]}', "contexts.one.inputs.write: it must say how many"),
    ('"words.txt"', '{examples = ["a"], write = 9, field = "q"}', "field belongs to a file"),
    ('field = "q"', 'field = "qq"', "rows.jsonl: line 1: it has no field 'qq'"),
    ('reference = "a"', 'reference = "b"', "rows.jsonl: line 1: it has no field 'b'"),
    ('{file = "rows.jsonl", field = "q", reference = "a"}', '"rows.jsonl"', "rows.jsonl are JSON: name the field of the input"),
    ('"words.txt"', '{file = "words.txt", self_study = true}', "self_study belongs to examples"),
    ('{file = "rows.jsonl", field = "q", reference = "a"}', '{examples = ["a"], write = 9, self_study = true}',
     "contexts.two.inputs.self_study: the teacher's prompt must be a text"),
    ('{after = "#"}', '"everything"\ntests = {examples = ["a"], write = 9}', "contexts.one.tests: they must be given"),
    ('{after = "#"}', '"everything"\nrules = {end_with = "a"}', "rules: unknown key 'end_with'; did you mean ends_with?"),
    ('{after = "#"}', '"everything"\nrules = {never = "a"}', "contexts.one.rules.never: it must be a list of texts"),
    ('{after = "#"}', '"everything"\nrules = {pattern = "("}', "contexts.one.rules.pattern: it is no regular expression"),
    ("recursive = true", "plain = 1", "plain: it must be true or false"),
    ('{after = "#"}', '"evrything"', "contexts.one.answer: it must be \"everything\""),
    ('{after = "#"}', '{aftr = "#"}', "unknown key 'aftr'; did you mean after?"),
    ('{after = "#"}', '{between = ["#"]}', "contexts.one.answer.between: it must be two"),
    ('{after = "#"}', '{pattern = "#(.*"}', "contexts.one.answer.pattern: it is no regular expression"),
    ('{after = "#"}', '{pattern = "#.*"}', "contexts.one.answer.pattern: it has no group"),
    ('["two", "one"]', '["tow"]', "rounds[1]: there is no context 'tow'; did you mean two?"),
    ("recursive = true", "recursive = 1", "recursive: it must be true or false"),
    ("recursive = true", "recursive = ", "is not valid TOML"), ('[contexts.one]\nteacher', "[contexts.one]\nstudent", "TOML"),
    ('model = "data/pocket"', "model = 3", "model: it must be a text")])
def test_what_is_wrong_is_one_sentence(file, old, new, problem):
    assert old in TOML
    file.write_text(TOML.replace(old, new))
    with pytest.raises(ValueError) as caught:
        read_contexts(file)
    assert problem in str(caught.value) and str(file.parent) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_and_missing_files(file):
    for content in (b"\xff\xfe", b"", b"contexts = 7", b"[contexts.x]", b"x = [" * 5000):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="my.toml"):
            read_contexts(file)
    with pytest.raises(ValueError, match="other.toml cannot be read: No such file"):
        read_contexts(file.parent / "other.toml")
    for rows, problem in (("{", "line 1: it is not valid JSON"), ("[]", "must be an object"), ('{"q": ""}', "no field 'a'"), ("", "no inputs"),
                          ('{"q": "b", "a": null}', "line 1: a: it must be a text"), ('{"q": "b", "a": {"b": 1}}', "line 1: a: it must be a text")):
        file.write_text(TOML)
        (file.parent / "rows.jsonl").write_text(rows)
        with pytest.raises(ValueError, match=problem):
            read_contexts(file)


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut, changed in some bytes, or with lines that are lost, doubled, in another order or of another value."""
    lines, at = content.split(b"\n"), int(rng.integers(len(content)))
    row, other = rng.integers(len(lines), size=2)
    return [lambda: content[:at], lambda: content[at:],
            lambda: content[:at] + rng.bytes(3) + content[at + 3 :],
            lambda: b"\n".join(lines[:row] + lines[row + 1 :]),
            lambda: b"\n".join([*lines[:row], lines[row], *lines[row:]]),
            lambda: b"\n".join([*lines[:row], lines[other], *lines[row + 1 :]]),
            lambda: b"\n".join([*lines[:row], lines[row].split(b"=")[0] + b"= 7", *lines[row + 1 :]]),
            lambda: content.replace(b"{", b"[", 1), lambda: content.replace(b'"', b"", int(rng.integers(1, 4))),
            lambda: content.replace(b" = ", b"_x = ", int(rng.integers(1, 9)))][rng.integers(10)]()


@pytest.mark.parametrize("which", ["company.toml", "ours"])
def test_damage_of_fifty_kinds_is_one_sentence_or_another_valid_file(file, which):
    content = TOML.encode() if which == "ours" else (CONTEXTS / which).read_bytes()
    (file.parent / "company.txt").write_bytes((CONTEXTS / "company.txt").read_bytes())
    refused = 0
    for seed in range(50):
        file.write_bytes(damaged(content, np.random.default_rng((seed, len(content)))))
        try:
            for named in read_contexts(file).contexts.values():
                assert named.student and named.teachers
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and str(file.parent) in str(error), str(error)
    assert 20 <= refused <= 50


def extract(tokenizer: TextTokenizer, answer: object, ids: list[int]) -> tuple[str | None, int]:
    f = read_answer(Place(Path("x.toml"), "answer"), answer)(tokenizer)
    found = f(ids)
    return (None if found is None else tokenizer.decode(ids[found])), f.pieces


def test_answers_are_slices_of_words():
    ids = WORDS.backend.encode("a b # c d # e", add_special_tokens=False).ids
    assert extract(WORDS, {"after": "#"}, ids) == ("c d # e", 0)
    assert extract(WORDS, {"between": ["#", "#"]}, ids) == ("c d", 0)
    assert extract(WORDS, {"pattern": "# (.)"}, ids) == ("c", 0)
    assert extract(WORDS, {"after": "Answer:"}, ids) == (None, 0)
    assert extract(WORDS, {"after": "e"}, ids) == (None, 0), "nothing stands after it"


def test_a_border_inside_a_token():
    pieces = ["Answer", ":\n\n", ":", " 4", "2", "#4", "2.", "Ã", "©", "."]
    backend = Tokenizer(models.BPE({p.replace(" ", "Ġ").replace("\n", "Ċ"): i for i, p in enumerate(pieces)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = TextTokenizer(backend, eos=None, pad=None, ends_prompts=False)

    def of(answer, *tokens):
        return extract(tokenizer, answer, [backend.token_to_id(t.replace(" ", "Ġ").replace("\n", "Ċ")) for t in tokens])
    assert of({"after": "Answer:"}, "Answer", ":", " 4", "2") == (" 42", 0), "no border inside a token"
    assert of({"after": "Answer:"}, "Answer", ":\n\n", " 4", "2") == (" 42", 0), "only space of the answer is in it: dropped"
    assert of({"after": "#"}, "#4", "2") == ("#42", 1), "some of the answer is in it: kept, and counted"
    assert of({"between": ["#", "."]}, "#4", "2.") == ("#42.", 1), "counted once a completion"
    assert of({"after": ":"}, ":", "Ã", "©", "2") == ("é2", 0), "a character of two tokens"
    assert of({"between": [":", "é"]}, ":", "2", "Ã", "©") == ("2", 0)


def test_spans_of_long_answers_are_found_fast():
    ids = WORDS.backend.encode("a " * 4000 + "# b", add_special_tokens=False).ids
    f, calls = Span(WORDS, re.compile("#(.*)")), []
    decode = WORDS.decode
    f.tokenizer = type("Counting", (), {"decode": lambda self, some: calls.append(1) or decode(some)})()
    assert f(ids) == slice(4001, 4002) and len(calls) < 50
