"""The real T5 tokenizer against known ids, the pocket tokenizer, and files that are no tokenizers."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from minicd.tasks.pocket import WORDS, pocket_tokenizer
from minicd.tokenizer import TextTokenizer, word_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
T5_FILE = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "tokenizers" / "t5" / "tokenizer.json"
needs_t5 = pytest.mark.skipif(not T5_FILE.exists(), reason=f"the T5 tokenizer is not at {T5_FILE}")
EOS = 1


@pytest.fixture(scope="module")
def t5() -> TextTokenizer:
    return TextTokenizer.load(T5_FILE)


@needs_t5
@pytest.mark.parametrize("text, ids", [
    ("translate English to German: That is good.", [13959, 1566, 12, 2968, 10, 466, 19, 207, 5, 1]),
    ("translate English to German: The house is wonderful.", [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5, 1]),
    ("Hello <extra_id_0> world<extra_id_1>", [8774, 32099, 296, 32098, 1])])
def test_t5_ids(t5, text, ids):
    assert t5.encode(text) == ids
    assert t5.encode_all([text, text]) == [ids, ids]


@needs_t5
def test_t5_special_tokens_and_size(t5):
    assert (t5.pad_id, t5.eos_id, len(t5)) == (0, EOS, 32100)  # 32,128 rows in the embedding
    assert t5.encode("") == [EOS]


@needs_t5
def test_t5_round_trip_and_pieces(t5):
    text = "Where is the book? It's on the table, as always."
    ids = t5.encode(text)
    assert t5.decode(ids) == text
    assert "".join(t5.pieces(ids[:-1])) == text.replace(" ", "")
    assert t5.pieces([5]) == ["."]


@needs_t5
def test_nothing_is_cut_or_padded(t5):
    rows = t5.encode_all(["word " * 2000, "word"])
    assert len(rows[0]) > 2000 and rows[1] == t5.encode("word")


@pytest.fixture(scope="module")
def pocket() -> TextTokenizer:
    return pocket_tokenizer()


def test_pocket_words_are_one_token_each(pocket):
    assert len(set(WORDS)) == len(WORDS)
    text = " ".join(WORDS)
    ids = pocket.encode(text)
    assert ids == [*range(3, 3 + len(WORDS)), EOS]
    assert len(pocket) == 3 + len(WORDS)
    assert pocket.pieces(ids[:-1]) == WORDS


def test_pocket_round_trip(pocket):
    text = "copy : 1 2 a | z => Final answer: # ?"
    assert pocket.decode(pocket.encode(text)) == text
    assert pocket.encode(pocket.decode(pocket.encode(text))) == pocket.encode(text)


def test_pocket_says_unknown_of_other_words(pocket):
    assert pocket.encode("copy elephant") == [pocket.encode("copy")[0], 2, EOS]


def test_save_and_load(pocket, tmp_path):
    pocket.save(tmp_path / "tokenizer.json")
    loaded = TextTokenizer.load(tmp_path / "tokenizer.json")
    text = "reverse : 4 2"
    assert loaded.encode(text) == pocket.encode(text) and len(loaded) == len(pocket)


@pytest.mark.parametrize("text", ["", "one", "one </s>", "</s>"])
def test_one_stop_token_ends_a_text_and_never_two(text):
    tokenizer = word_tokenizer(["one", "two"])
    ids = tokenizer.encode(text)
    assert ids[-1] == EOS and ids.count(EOS) <= 1 + text.count("</s>")
    assert tokenizer.with_eos(ids) == ids


def test_with_eos_leaves_its_argument_alone():
    tokenizer, ids = word_tokenizer(["one"]), [3]
    assert tokenizer.with_eos(ids) == [3, EOS] and ids == [3]
    assert tokenizer.with_eos([]) == [EOS]


def test_a_tokenizer_that_adds_no_stop_token_itself(tmp_path):
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "one": 3}, unk_token="<unk>")).save(str(path))
    assert TextTokenizer.load(path).encode("one") == [3, EOS]


def test_ids_may_have_gaps(tmp_path):
    """The size decides whether the embedding is large enough: what counts is the highest id."""
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "far": 50}, unk_token="<unk>")).save(str(path))
    assert len(TextTokenizer.load(path)) == 51


def test_padding_and_truncation_of_the_file_are_switched_off(tmp_path):
    backend = Tokenizer.from_file(str(FIXTURES / "t5-v1.0" / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=30)
    backend.save(str(tmp_path / "tokenizer.json"))
    ids = TextTokenizer.load(tmp_path / "tokenizer.json").encode("the ring there")
    assert len(ids) > 4 and 0 not in ids


def test_the_mark_of_a_leading_space_is_taken_off():
    tokenizer = TextTokenizer.load(FIXTURES / "t5-v1.0" / "tokenizer.json")
    ids = tokenizer.encode("the ring")
    assert "\u2581the" in tokenizer.backend.get_vocab() and tokenizer.pieces(ids)[0] == "the"
    assert tokenizer.decode(ids) == "the ring"


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]", b"hello", b"\xff\xfe", json.dumps({"model": {"type": "BPE"}}).encode()])
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json is not a readable tokenizer"):
        TextTokenizer.load(path)


def test_a_missing_file_or_a_folder(tmp_path):
    for path in (tmp_path / "tokenizer.json", tmp_path):
        with pytest.raises(ValueError, match="is not a readable tokenizer"):
            TextTokenizer.load(path)


@pytest.mark.parametrize("missing", ["</s>", "<pad>"])
def test_a_tokenizer_without_a_token_that_t5_needs(tmp_path, missing):
    path = tmp_path / "tokenizer.json"
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    del vocabulary[missing]
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(path))
    with pytest.raises(ValueError, match=f"tokenizer.json .* no {missing} token"):
        TextTokenizer.load(path)
