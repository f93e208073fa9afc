"""The tokenizer files of T5, GPT-2 and Qwen3 against published ids, small hand-made ones, endings, and damaged files."""

import base64
import itertools
import json
import random
import struct
import time
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from data.world.lists import WORDS, pocket_tokenizer
from minicd.hf.tokenizers import read_backend, read_sentencepiece, read_tokenizer
from minicd.tokenizer import TextTokenizer, word_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
EOS, END = 1, "<|endoftext|>"
ODD = ["", " ", "  two  spaces ", "\ta tab\nand\r\nlines\n\n", "ＡＢＣ １２３", "a\u00a0b\u3000c\u200bd\u2028e\x85f", "it's I'M DON'T",
       "\ufeffmark\u00ad", "café cafe\u0301", "ﬁ ½ ① ﷺ ｶﾞ", "😀 👩‍👩‍👧 日本語 한글", "{<x>}", "\x00\x7f", "▁ ▁a", "İßΩ", "0 10 2024",
       "one </s> two <pad><unk>", "a <extra_id_7> b<extra_id_99>c<extra_id_100> <extra_id_"]


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


@cache
def real(name: str) -> TextTokenizer:
    if name == "t5":
        return read_tokenizer(shared("tokenizers/t5/tokenizer.json"))
    if name == "spiece":
        return TextTokenizer(read_sentencepiece(shared("tokenizers/t5/spiece.model")))
    return read_tokenizer(shared(f"tokenizers/{name}"), END, pad=None, ends_prompts=False)


def random_texts(n: int) -> list[str]:
    """Characters of every plane, mixed with what tokenizers treat specially."""
    rng = random.Random(7)
    ranges = [(0x20, 0x7F), (0, 0x3000), (0x3000, 0xD800), (0xE000, 0x110000)]
    return ["".join(rng.choice(ODD) if rng.random() < 0.3 else chr(rng.randrange(*rng.choice(ranges)))
                    for _ in range(rng.randrange(1, 20))) for _ in range(n)]


@pytest.mark.parametrize("file", ["t5", "spiece"])
@pytest.mark.parametrize("text, ids", [
    ("translate English to German: That is good.", [13959, 1566, 12, 2968, 10, 466, 19, 207, 5, 1]),
    ("translate English to German: The house is wonderful.", [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5, 1]),
    ("Hello <extra_id_0> world<extra_id_1>", [8774, 32099, 296, 32098, 1])])
def test_t5_ids(file, text, ids):
    tokenizer = real(file)
    assert tokenizer.encode(text) == tokenizer.encode_answer(text) == ids
    assert tokenizer.encode_all([text, text]) == tokenizer.encode_answers([text, text]) == [ids, ids]


@pytest.mark.parametrize("file", ["t5", "spiece"])
def test_t5_special_tokens_and_size(file):
    tokenizer = real(file)
    assert (tokenizer.pad_id, tokenizer.eos_id, len(tokenizer)) == (0, EOS, 32100)  # 32,128 rows in the embedding
    assert tokenizer.encode("") == [EOS]
    assert [tokenizer.backend.token_to_id(f"<extra_id_{k}>") for k in (0, 7, 99)] == [32099, 32092, 32000]
    assert tokenizer.decode([8774, 0, 32099, 2, 296, 1]) == "Hello world"


def test_t5_round_trip_and_pieces():
    t5, text = real("t5"), "Where is the book? It's on the table, as always."
    ids = t5.encode(text)
    assert t5.decode(ids) == text
    assert "".join(t5.pieces(ids[:-1])) == " " + text
    assert t5.pieces([5]) == ["."]
    rows = t5.encode_all(["word " * 2000, "word"])  # neither cut nor padded
    assert len(rows[0]) > 2000 and rows[1] == t5.encode("word")


def test_spiece_model_and_tokenizer_json_are_the_same_tokenizer():
    ours, theirs = (json.loads(real(name).backend.to_str()) for name in ("spiece", "t5"))
    for part in ("added_tokens", "normalizer", "pre_tokenizer", "decoder"):
        assert ours[part] == theirs[part], part
    assert ours["model"]["unk_id"] == theirs["model"]["unk_id"]
    for (piece, score), (expected, close) in zip(ours["model"]["vocab"], theirs["model"]["vocab"], strict=True):
        assert piece == expected and score == pytest.approx(close, abs=1e-12)


def test_spiece_model_gives_the_ids_of_tokenizer_json_on_odd_texts():
    t5, spiece, texts = real("t5"), real("spiece"), ODD + random_texts(3000)
    expected = t5.encode_all(texts)
    assert spiece.encode_all(texts) == expected
    assert [spiece.decode(ids) for ids in expected] == [t5.decode(ids) for ids in expected]
    assert len({i for ids in expected for i in ids}) > 300 and 32092 in t5.encode(ODD[-1])  # the texts do reach far


def test_spiece_model_gives_the_ids_of_tokenizer_json_on_sentences():
    texts = shared("sentiment/imdb_labelled.txt").read_text(encoding="utf-8").split("\n")
    for path in sorted(shared("natural_instructions/tasks").glob("*.json")):
        task = json.loads(path.read_text(encoding="utf-8"))
        texts += [task["Definition"][0], *(item["input"] + "  " + item["output"][0] for item in task["Instances"][:25])]
    assert len(texts) > 2000 and real("spiece").encode_all(texts) == real("t5").encode_all(texts)


@pytest.mark.parametrize("text, ids", [  # as published with Qwen's chat models
    ("Hello world", [9707, 1879]),
    ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
     [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]),
    ("Give me a short introduction to large language model.", [35127, 752, 264, 2805, 16800, 311, 3460, 4128, 1614, 13]),
    ("您好, 请从 1 数到 10000000.", [111308, 11, 220, 14880, 45181, 220, 16, 47685, 26939, 220, 16, *[15] * 7, 13]),
    ("<think>\n\n</think>\n\n", [151667, 271, 151668, 271]),
    ("2024", [17, 15, 17, 19]), ("", [])])
def test_qwen_ids(text, ids):
    assert real("qwen3").encode(text) == ids and real("qwen3").encode_answer(text) == ids + [151643]


def test_qwen_splits():
    def split(text):
        return [part.replace("Ġ", " ").replace("Ċ", "\n") for part, _ in steps.pre_tokenize_str(text)]

    steps = real("qwen3").backend.pre_tokenizer
    assert split("don't I'M we'LLs 10") == ["don", "'t", " I", "'M", " we", "'LL", "s", " ", "1", "0"]  # capitals, unlike GPT-2
    assert split("x\n\n  y.\n") == ["x", "\n\n", " ", " y", ".\n"]
    assert real("qwen3").encode("cafe\u0301") == real("qwen3").encode("café") != real("qwen3").encode("cafe")  # composed first


def test_qwen_size_and_special_tokens():
    qwen = real("qwen3")
    assert (len(qwen), qwen.eos_id, qwen.pad_id) == (151669, 151643, None)
    assert qwen.decode(qwen.encode("<|im_start|>a<think>b<|im_end|>")) == "a<think>b"  # <think> is added, but not special
    assert TextTokenizer(qwen.backend, "<|im_end|>", END, ends_prompts=False).pad_id == 151643


def test_gpt2_ids():
    gpt2 = real("gpt2")
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert gpt2.encode("one" + END + "two") == [505, 50256, 11545]
    assert gpt2.decode([15496, 50256, 995]) == "Hello world"
    assert (len(gpt2), gpt2.eos_id, gpt2.pad_id) == (50257, 50256, None)
    assert gpt2.encode_answers(["Hello world", "", END]) == [[15496, 995, 50256], [50256], [50256]]


def test_byte_level_round_trips():
    texts = ODD + random_texts(1000)
    composed = [unicodedata.normalize("NFC", text) for text in texts]
    for name, expected in (("gpt2", texts), ("qwen3", composed)):
        rows = real(name).encode_all(texts)
        assert [real(name).decode(ids) for ids in rows] == expected and max(map(len, rows)) > 50
    assert composed != texts


@pytest.mark.parametrize("name, number", [("gpt2", [" 7"]), ("qwen3", [" ", "7"])])
def test_byte_level_pieces_are_readable(name, number):
    tokenizer = real(name)
    assert tokenizer.pieces(tokenizer.encode("Hello world: 7\né" + END)) == ["Hello", " world", ":", *number, "\n", "é", END]
    assert "\ufffd" in tokenizer.pieces(tokenizer.encode("\U00020000"))  # part of a character
    assert tokenizer.pieces([len(tokenizer) + 5]) == [""]


def test_pocket_words_are_one_token_each():
    pocket, text = pocket_tokenizer(), " ".join(WORDS)
    ids = pocket.encode(text)
    assert len(set(WORDS)) == len(WORDS) and len(pocket) == 3 + len(WORDS)
    assert ids == [*range(3, 3 + len(WORDS)), EOS]
    assert pocket.pieces(ids[:-1]) == WORDS and pocket.decode(ids) == text
    assert pocket.encode("copy elephant") == [pocket.encode("copy")[0], 2, EOS]


def test_save_and_load(tmp_path):
    pocket = pocket_tokenizer()
    pocket.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        loaded = read_tokenizer(path)
        assert loaded.encode("reverse : 4 2") == pocket.encode("reverse : 4 2") and len(loaded) == len(pocket)


def test_the_mark_of_a_leading_space_is_taken_off():
    tokenizer = read_tokenizer(FIXTURES / "t5-v1.0")
    ids = tokenizer.encode("the ring")
    assert "\u2581the" in tokenizer.backend.get_vocab() and tokenizer.pieces(ids)[0] == " the"
    assert tokenizer.decode(ids) == "the ring"


def test_ids_may_have_gaps():
    """The size decides whether the embedding is large enough: what counts is the highest id."""
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "far": 50}, unk_token="<unk>"))
    assert len(TextTokenizer(backend)) == 51


def test_padding_and_truncation_of_the_file_are_switched_off(tmp_path):
    backend = Tokenizer.from_file(str(FIXTURES / "t5-v1.0" / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=30)
    backend.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        ids = read_tokenizer(path).encode("the ring there")
        assert len(ids) > 4 and 0 not in ids


@pytest.mark.parametrize("text", ["", "one", "one </s>", "</s>"])
def test_one_stop_token_ends_a_text_and_never_two(text):
    tokenizer = word_tokenizer(["one", "two"])
    ids, given = tokenizer.encode(text), [3]
    assert ids[-1] == EOS and ids.count(EOS) <= 1 + text.count("</s>")
    assert tokenizer.with_eos(ids) == ids == tokenizer.encode_answer(text)
    assert tokenizer.with_eos(given) == [3, EOS] and given == [3] and tokenizer.with_eos([]) == [EOS]


def words(template: str | None = None) -> Tokenizer:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "one": 3, "two": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>", "</s>"])
    if template is not None:
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return backend


@pytest.mark.parametrize("template, begin", [(None, []), ("<s> $A", [0]), ("<s> $A </s>", [0]), ("$A </s>", [])])
def test_a_decoder_stops_after_answers_and_not_after_prompts(template, begin):
    tokenizer = TextTokenizer(words(template), pad=None, ends_prompts=False)
    assert tokenizer.encode("one two") == [*begin, 3, 4] and tokenizer.encode("") == begin
    assert tokenizer.encode_all(["one", "two one"]) == [[*begin, 3], [*begin, 4, 3]]
    assert tokenizer.encode("one </s>") == [*begin, 3, 1]  # as between the examples of a prompt: the text's own
    assert tokenizer.encode_answer("one") == [3, 1] and tokenizer.encode_answer("") == [1]
    assert tokenizer.encode_answers(["one </s>", "two one"]) == [[3, 1], [4, 3, 1]]
    assert tokenizer.pad_id is None


@pytest.mark.parametrize("template, begin", [(None, []), ("<s> $A", [0]), ("$A </s>", [])])
def test_an_encoder_decoder_stops_after_both(template, begin):
    tokenizer = TextTokenizer(words(template), pad="<s>")
    assert tokenizer.encode("one") == tokenizer.encode_answer("one") == [*begin, 3, 1] and tokenizer.pad_id == 0


PIECE_IDS = {"a": 0, "b": 1, "c": 2, "Ġ": 3, "1": 4, "ab": 5, "abc": 6, "Ġc": 7, "11": 8, END: 9}
VOCAB, MERGES, CONFIG = "vocab.json", "merges.txt", "tokenizer_config.json"
LINES = "#version: 0.2\na b\nab c\nĠ c\n1 1\n"
QWEN = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": {
    "12": {"content": "<x>", "special": True}, "9": {"content": END, "special": True}, "11": {"content": "<y>", "lstrip": True}}}


def byte_level(folder: Path, files: dict | None = None) -> Path:
    """Writes the files, those given instead of the ones above, and returns their folder. Neither text nor bytes: JSON."""
    for name, content in {VOCAB: PIECE_IDS, MERGES: LINES, **(files or {})}.items():
        content = content if isinstance(content, (str, bytes)) else json.dumps(content, ensure_ascii=False)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize("config", [{}, {"model_max_length": 1024}, {"tokenizer_class": "GPT2TokenizerFast"}, None])
def test_gpt2_files(tmp_path, config):
    files = {} if config is None else {CONFIG: config}
    tokenizer = read_tokenizer(byte_level(tmp_path, files), END, pad=None, ends_prompts=False)
    assert tokenizer.encode(f"abc c11{END} cab") == [6, 7, 8, 9, 7, 5]
    assert tokenizer.decode([6, 9, 7]) == "abc c" and tokenizer.pieces([7, 9]) == [" c", END]


def test_qwen_files(tmp_path):
    text = f"abc c11<x>ab <y>{END}"
    tokenizer = read_tokenizer(byte_level(tmp_path, {CONFIG: QWEN}), END, pad="<x>", ends_prompts=False)
    assert tokenizer.encode(text) == [6, 7, 4, 4, 12, 5, 11, 9]  # digits one by one; <y> takes the space before it
    assert tokenizer.decode([6, 12, 11, 9]) == "abc<y>" and (len(tokenizer), tokenizer.pad_id) == (13, 12)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert read_backend(tmp_path).encode(text).ids == [6, 7, 4, 4, 12, 5, 11, 9]


def test_added_tokens_of_an_older_form(tmp_path):
    """Slow tokenizers wrote them beside the vocabulary; tokenizer_config.json, where it names them, knows more."""
    more = {"added_tokens.json": {"<x>": 10, "<y>": 11}}
    tokenizer = read_tokenizer(byte_level(tmp_path, more), END, pad=None, ends_prompts=False)
    assert tokenizer.encode("abc<x>ab<y> c") == [6, 10, 5, 11, 7] and tokenizer.decode([6, 10, 7]) == "abc<x> c"
    byte_level(tmp_path, more | {CONFIG: token("10", {"content": "<x>", "special": True})})
    assert read_tokenizer(tmp_path, END, pad=None, ends_prompts=False).decode([6, 10, 7]) == "abc c"
    for wrong in ({"<x>": 5}, {"<x>": "z"}, ["<x>"], {"<x>": None}):
        refused(byte_level(tmp_path, {"added_tokens.json": wrong, CONFIG: {}}), "is not a readable tokenizer")


@pytest.mark.parametrize("name, content", [("added_tokens.json", {"<sep>": 110, "<extra_id_0>": 109}),
                                           (CONFIG, {"added_tokens_decoder": {"110": {"content": "<sep>"}}})])
def test_a_spiece_model_with_added_tokens_is_refused(tmp_path, name, content):
    (tmp_path / "spiece.model").write_bytes(spiece_bytes())
    (tmp_path / name).write_text(json.dumps(content).replace("<sep>", "<extra_id_7>"))
    read_tokenizer(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    refused(tmp_path, "'<sep>' is not in spiece.model")


def test_windows_lines_no_header_a_leading_space_and_a_better_file(tmp_path):
    folder = byte_level(tmp_path, {MERGES: "a b\r\nab c\r\nĠ c\r\n1 1\r\n", CONFIG: {"add_prefix_space": True}})
    assert read_backend(folder).encode("c abc").ids == [7, 3, 6]
    word_tokenizer(["abc"]).save(folder / "tokenizer.json")  # which goes before the other files
    assert read_backend(folder).encode("abc").ids == [3, 1]


PIECES = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("▁", -2.0, 1), ("▁the", -3.0, 1), ("r", -5.0, 1),
          ("ing", -4.0, 1), ("ring", -4.5, 1), ("s", -3.5, 1), ("é", -9.0, None)]


def varint(number: int) -> bytes:
    return bytes([number & 0x7F | 0x80]) + varint(number >> 7) if number > 0x7F else bytes([number])


def field(number: int, value: int | float | str | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def spiece_bytes(pieces=PIECES, trainer: bytes = b"", normaliser: bytes = field(3, 1), announced: int | None = None) -> bytes:
    entries = [field(1, piece) + field(2, score) + (b"" if kind is None else field(3, kind)) for piece, score, kind in pieces]
    spec = field(1, "corpus") + field(4, len(pieces) if announced is None else announced) + trainer
    return b"".join(field(1, entry) for entry in entries) + field(2, spec) + field(3, normaliser)


def test_hand_made_spiece_model(tmp_path):
    (tmp_path / "spiece.model").write_bytes(spiece_bytes(announced=99, trainer=field(4, 10)))  # of two values the last counts
    tokenizer, text = read_tokenizer(tmp_path), " the  rings\t<extra_id_3> zz</s>é"
    ids = tokenizer.encode(text)
    assert ids == [4, 3, 7, 8, 106, 3, 2, 1, 3, 9, EOS]  # ten pieces and a hundred sentinels, of which <extra_id_0> is last
    assert tokenizer.pieces(ids[:4]) == [" the", " ", "ring", "s"] and tokenizer.decode(ids[:4]) == "the rings"
    tokenizer.save(tmp_path / "tokenizer.json")
    assert read_tokenizer(tmp_path / "tokenizer.json").encode(text) == ids and len(tokenizer) == 110


def refused(path: Path, names: str, says: str = "") -> None:
    """Refused in one line that names the file, and for the reason meant."""
    with pytest.raises(ValueError) as caught:
        read_tokenizer(path)
    message = str(caught.value)
    assert names in message and says in message and "\n" not in message, message


@pytest.mark.parametrize("content", [
    b"", b"{}", b"[1, 2]", b"hello", b"\xff\xfe", json.dumps({"model": {"type": "BPE"}}).encode(),
    json.dumps({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}).encode()])  # the library panics
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    for given in (path, tmp_path):
        refused(given, "tokenizer.json", "is not a readable tokenizer")


def test_a_missing_file_or_an_empty_folder(tmp_path):
    refused(tmp_path / "tokenizer.json", "tokenizer.json", "is not a readable tokenizer")
    for present in ("README.md", "merges.txt"):
        (tmp_path / present).write_text("a b")
        for name in ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model"):
            refused(tmp_path, str(tmp_path), name)


@pytest.mark.parametrize("missing", ["</s>", "<pad>"])
def test_a_tokenizer_without_a_token_that_the_model_needs(tmp_path, missing):
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    del vocabulary[missing]
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    refused(tmp_path / "tokenizer.json", "tokenizer.json", f"no {missing} token, which the model needs")
    refused(tmp_path, str(tmp_path), f"no {missing} token, which the model needs")


def token(number: str, entry) -> dict:
    return {"added_tokens_decoder": {number: entry}}


@pytest.mark.parametrize("file, content, says", [
    (VOCAB, b"\xff{}", "utf-8"), (VOCAB, '{"a": 0', "JSON"), (VOCAB, "[" * 100_000, "Recursion"), (VOCAB, ["a"], "list"),
    (VOCAB, {}, "ids"), (VOCAB, {"a": "0"}, "ids"), (VOCAB, {"a": True}, "ids"), (VOCAB, {"a": -1}, "ids"),
    (VOCAB, {"": 0}, "ids"), (VOCAB, {"a": 1 << 40}, "ids"), (VOCAB, PIECE_IDS | {"c": 1}, "same id"),
    (VOCAB, json.dumps(PIECE_IDS | {"\ud800": 10}), "Unicode"),
    (MERGES, b"a b\n\xe9 c", "utf-8"), (MERGES, LINES + "a c\n", "'a c'"), (MERGES, LINES + "a bc\n", "'a bc'"),
    (MERGES, LINES + "a b c\n", "'a b c'"), (MERGES, LINES + "ab\n", "'ab'"), (MERGES, LINES + "a  b", "'a  b'"),
    (MERGES, LINES.replace("Ġ c\n", ""), "'Ġc'"), (MERGES, "", "'ab'"), (CONFIG, "{", "JSON"), (CONFIG, [], "list"),
    (CONFIG, {"tokenizer_class": "RobertaTokenizer"}, "Roberta"), (CONFIG, {"tokenizer_class": ["x"]}, "tokenizer_class"),
    (CONFIG, {"add_bos_token": True}, "add_bos_token"), (CONFIG, {"added_tokens_decoder": []}, "TypeError"),
    (CONFIG, token("10", 5), "TypeError"), (CONFIG, token("10", {}), "content"), (CONFIG, token("10", {"content": 5}), "Type"),
    (CONFIG, token("x", {"content": "y"}), "'x'"), (CONFIG, token("10", {"content": "x", "special": "no"}), "TypeError"),
    (CONFIG, token("8", {"content": "x"}), "'x'"), (CONFIG, token("10", {"content": "ab"}), "'ab'"),
    (CONFIG, token("-1", {"content": "x"}), "'x'"), (CONFIG, token("4294967296", {"content": "x"}), "'x'"),
    (CONFIG, {"added_tokens_decoder": {"10": {"content": "<x>"}, "11": {"content": "<x>"}}}, "'<x>'")], ids=itertools.count())
def test_damaged_byte_level_files(tmp_path, file, content, says):
    refused(byte_level(tmp_path, {file: content}), f"{file} is not a readable tokenizer", says)


def test_byte_level_files_cut_short_anywhere(tmp_path):
    read_backend(byte_level(tmp_path, {CONFIG: QWEN}))
    for name, harmless in ((VOCAB, 0), (MERGES, 1), (CONFIG, 0)):  # 1: the last end of line
        data = (tmp_path / name).read_bytes()
        for length in range(len(data) - harmless):
            (tmp_path / name).write_bytes(data[:length])
            refused(tmp_path, " is not a readable tokenizer")
        (tmp_path / name).write_bytes(data)


@pytest.mark.parametrize("content, says", [
    (spiece_bytes([*PIECES, ("<0x0A>", 0.0, 6)]), "byte"), (spiece_bytes([*PIECES, ("x", 0.0, 4)]), "user-defined"),
    (spiece_bytes([*PIECES, ("x", 0.0, 5)]), "unused"), (spiece_bytes([*PIECES, ("x", 0.0, 77)]), "77"),
    (spiece_bytes([*PIECES, ("r", -1.0, 1)]), "once"), (spiece_bytes([*PIECES, ("<extra_id_0>", 0.0, 3)]), "no sentinels"),
    (spiece_bytes([*PIECES, ("<unk2>", 0.0, 2)]), "single"), (spiece_bytes(PIECES[:2] + PIECES[3:]), "single"),
    (spiece_bytes(PIECES[:1] + PIECES[2:]), "</s>"), (spiece_bytes([*PIECES, ("", 0.0, 1)]), "''"), (spiece_bytes([]), ""),
    (spiece_bytes([*PIECES, ("x", float("nan"), 1)]), "nan"), (spiece_bytes(announced=11), "10 pieces, not the 11"),
    (spiece_bytes(trainer=field(3, 2)), "model_type 2"), (spiece_bytes(trainer=field(35, 1)), "byte_fallback"),
    (spiece_bytes(trainer=field(24, 1)), "whitespace_as_suffix"), (spiece_bytes(normaliser=field(3, 0)), "add_dummy_prefix 0"),
    (spiece_bytes(normaliser=field(4, 0)), "remove_extra"), (spiece_bytes(normaliser=field(5, 0)), "escape_whitespaces"),
    (spiece_bytes(normaliser=field(2, "junk")), "Precompiled"), (spiece_bytes(normaliser=field(2, bytes(10))), "Panic"),
    (field(1, field(1, b"\xff") + field(2, 0.0)), "field 2"), (field(1, b"\x0a\x01\xff") + spiece_bytes(), "utf-8"),
    (field(1, field(1, "x")) + spiece_bytes(), "field 2"), (field(1, field(1, 5) + field(2, 0.0)) + spiece_bytes(), "field 1"),
    (field(1, 5) + spiece_bytes(), "TypeError"), (field(1, field(1, "x") + field(2, b"abc")) + spiece_bytes(), "4 bytes"),
    (b"\x0b" + spiece_bytes(), "damaged at byte 1"), (b"\x02\x00" + spiece_bytes(), "damaged"), (b"\xff" * 20, "a number"),
    (b"{}", ""), (b"", "field 2 is missing")], ids=itertools.count())
def test_damaged_spiece_models(tmp_path, content, says):
    (tmp_path / "spiece.model").write_bytes(content)
    refused(tmp_path, "spiece.model is not a readable tokenizer", says)


def test_a_spiece_model_cut_short_anywhere(tmp_path):
    for length in range(len(spiece_bytes())):
        (tmp_path / "spiece.model").write_bytes(spiece_bytes()[:length])
        refused(tmp_path, "spiece.model is not a readable tokenizer")


# files that make far too much of a text

REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "x" * 10**6}


def doubling(times: int) -> dict:
    double = {"type": "Replace", "pattern": {"String": "x"}, "content": "xx"}
    return {"type": "Sequence", "normalizers": [double] * times}


def charsmap_bomb() -> bytes:
    """T5's table, or the beginning of one, with a long replacement at its end."""
    return (1024).to_bytes(4, "little") + bytes(1024) + b"y" * 10**6 + b"\0"


BOMBS = [REPLACE, {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, REPLACE]}, doubling(40),
         {key: value for key, value in REPLACE.items() if key != "type"},  # the library guesses it
         REPLACE | {"pattern": {"Regex": "."}}, REPLACE | {"pattern": {"Regex": ""}, "content": "x" * 101},
         {"type": "Prepend", "prepend": "x" * 10**6},
         {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap_bomb()).decode()}]


def with_part(folder: Path, **parts) -> Path:
    """A small tokenizer.json with other parts, and added tokens that the library normalises as it reads them."""
    path = folder / "tokenizer.json"
    word_tokenizer([f"a{i}" for i in range(50)]).save(path)
    content = json.loads(path.read_text())
    added = [{"id": 100 + i, "content": "a" * 50 + str(i), "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": True, "special": False} for i in range(200)]
    path.write_text(json.dumps({**content, "added_tokens": content["added_tokens"] + added, **parts}))
    return path


@pytest.mark.parametrize("normaliser", BOMBS, ids=range(len(BOMBS)))
def test_a_normaliser_that_blows_texts_up_is_refused_at_once(tmp_path, normaliser):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"tokenizer.json is not a readable tokenizer: it can make \d+ characters or tokens of one"):
        read_backend(with_part(tmp_path, normalizer=normaliser).parent)
    assert time.monotonic() - start < 30  # not the minutes that it would take


def test_usual_normalisers_are_none_of_these(tmp_path):
    usual = [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
             {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}, {"type": "NFKC"}]
    assert read_backend(with_part(tmp_path, normalizer={"type": "Sequence", "normalizers": usual}).parent)
    with pytest.raises(ValueError, match="tokenizer.json is not a readable tokenizer"):
        read_backend(with_part(tmp_path, normalizer={"type": "Sequence", "normalizers": 3}).parent)


def test_a_template_with_far_too_many_tokens_is_refused(tmp_path):
    many = {"</s>": {"id": "</s>", "ids": [1] * 1000, "tokens": ["</s>"] * 1000}}
    template = {"type": "TemplateProcessing", "pair": [], "special_tokens": many,
                "single": [{"Sequence": {"id": "A", "type_id": 0}}] + [{"SpecialToken": {"id": "</s>", "type_id": 0}}] * 10**4}
    with pytest.raises(ValueError, match="it can make 10000000 characters or tokens of one"):
        read_backend(with_part(tmp_path, post_processor=template).parent)


def test_a_spiece_model_that_blows_texts_up_is_refused(tmp_path):
    content = spiece_bytes(normaliser=field(2, charsmap_bomb()))
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(ValueError, match="spiece.model is not a readable tokenizer: it can make 1000000 characters"):
        read_sentencepiece(tmp_path / "spiece.model")


def test_a_text_of_far_too_many_tokens_is_refused():
    backend = words()
    backend.normalizer = normalizers.Replace("a", "one " * 1000)
    tokenizer = TextTokenizer(backend, pad=None)
    calls = ["two"] * 300 + ["a"] * 300 + ["two"] * 3000
    for encode in (tokenizer.encode_all, tokenizer.encode_answers, lambda texts: tokenizer.encode(texts[300])):
        with pytest.raises(ValueError, match=r"makes \d+ tokens of a text of 1 characters: it is damaged or malicious"):
            encode(calls)
    assert tokenizer.encode_all(["two", "two " * 1000]) == [[4, 1], [4] * 1000 + [1]]
    assert tokenizer.encode_all([]) == []
