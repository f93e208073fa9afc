"""The tokenizer files of checkpoints: tokenizer.json; vocab.json and merges.txt; T5's spiece.model."""

from __future__ import annotations

import base64
import json
import math
import struct
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..runtime.files import read_json
from ..tokenizer import TextTokenizer

UNREADABLE = "is not a readable tokenizer"
IDS = range(2 ** 31)  # more than any model has
GROWTH = 100  # the most that one character may become; T5's normaliser makes up to 33 bytes of one
END_OF_TEXT = "<|endoftext|>"
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")

# Numbers of SentencePiece's format: the types of pieces, and the settings of trainer and normaliser with T5's
# values, which are also the defaults.
NORMAL, UNKNOWN, CONTROL = 1, 2, 3
OTHER_TYPES = {4: "user-defined", 5: "unused", 6: "byte"}
TRAINER = {3: ("model_type", 1), 24: ("treat_whitespace_as_suffix", 0), 35: ("byte_fallback", 0)}
NORMALISER = {3: ("add_dummy_prefix", 1), 4: ("remove_extra_whitespaces", 1), 5: ("escape_whitespaces", 1)}
SENTINELS = [f"<extra_id_{i}>" for i in reversed(range(100))]  # T5 adds these after the pieces of its file


def read_tokenizer(path: Path, eos: str = "</s>", pad: str | None = "<pad>",
                   ends_prompts: bool = True) -> TextTokenizer:
    """Read a folder or a `tokenizer.json`. Raises ValueError where it is no tokenizer or lacks a token."""
    path = Path(path)
    backend = read_backend(path) if path.is_dir() else read_tokenizer_json(path)
    try:
        return TextTokenizer(backend, eos, pad, ends_prompts)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from None


def read_backend(folder: Path) -> Tokenizer:
    """A folder's tokenizer, from the first of: tokenizer.json; vocab.json and merges.txt; spiece.model.

    It neither pads nor truncates. Raises ValueError, in one sentence that names the file, where it is
    missing or damaged.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        return read_tokenizer_json(folder / "tokenizer.json")
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return read_byte_level_bpe(folder)
    if (folder / "spiece.model").exists():
        return with_no_more(folder, read_sentencepiece(folder / "spiece.model"))
    raise ValueError(f"{folder} has no tokenizer: neither tokenizer.json, nor vocab.json with merges.txt, "
                     "nor spiece.model")


@contextmanager
def readable_errors(path: Path) -> Iterator[None]:
    """Errors inside become a ValueError of one line that names the file."""
    try:
        yield
    except BaseException as error:  # the library's panics are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        kind = "" if type(error) in (ValueError, Exception) else f"{type(error).__name__}: "
        raise ValueError(f"{path} {UNREADABLE}: {kind}{' '.join(str(error).splitlines())}") from None


def read_tokenizer_json(path: Path) -> Tokenizer:
    with readable_errors(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        times = growth(content.get("normalizer")) if isinstance(content, dict) else 1
    check_growth(path, times)
    with readable_errors(path):
        backend = Tokenizer.from_file(str(path))
    check_growth(path, backend.num_special_tokens_to_add(False))
    backend.no_padding()
    backend.no_truncation()
    return backend


def check_growth(path: Path, times: float) -> None:
    """Raises ValueError where a file could make a letter so long that memory or time run out."""
    if times > GROWTH:
        raise ValueError(f"{path} {UNREADABLE}: it can make {times:.0f} characters or tokens of one, which "
                         f"no tokenizer needs; the limit is {GROWTH}")


def growth(step: Any) -> float:
    """How many characters a normaliser makes of one, at most. `step`: as tokenizer.json has it.

    Looked up in the file, and before the library reads it, which already normalises added tokens.
    """
    if not isinstance(step, dict):
        return 1
    times = math.prod(growth(part) for part in step.get("normalizers") or [])  # of a sequence
    if isinstance(content := step.get("content"), str):  # replaces a pattern, which may fit between letters
        pattern = step.get("pattern")
        replaced = pattern.get("String") if isinstance(pattern, dict) else None
        times *= max(1, len(content) / len(replaced) if replaced else len(content) + 1)
    if isinstance(start := step.get("prepend"), str):
        times *= 1 + len(start)
    if isinstance(charsmap := step.get("precompiled_charsmap"), str):
        times *= longest_replacement(base64.b64decode(charsmap))
    return times


def longest_replacement(charsmap: bytes) -> int:
    """Of SentencePiece's table: a search tree after its size, then all replacements, each with a NUL."""
    tree = 4 + int.from_bytes(charsmap[:4], "little")
    return max(1, *map(len, charsmap[tree:].split(b"\0")))


def read_eos(path: Path, backend: Tokenizer) -> list[int]:
    """The id of the stop token that a tokenizer_config.json names, if the file is there and names one."""
    named = read_json_object(path).get("eos_token") if path.exists() else None
    name = named.get("content") if isinstance(named, dict) else named
    if named is None:
        return []
    number = backend.token_to_id(name) if isinstance(name, str) else None
    if number is None:
        raise ValueError(f"{path}: its eos_token {named!r} is no token of the tokenizer")
    return [number]


def read_byte_level_bpe(folder: Path) -> Tokenizer:
    """GPT-2's or Qwen's vocab.json and merges.txt, and what was added to them. Raises ValueError."""
    config, given = added_files(folder)
    vocabulary = read_vocabulary(folder / "vocab.json")
    with readable_errors(folder / "tokenizer_config.json"):
        normaliser, pre_tokenizer = byte_level_steps(config)
        added, ids = added_tokens(given, vocabulary)
    with readable_errors(folder / "merges.txt"):
        merges = read_merges(folder / "merges.txt", vocabulary, {token.content for token in added})
    with readable_errors(folder / "vocab.json"):
        backend = Tokenizer(models.BPE(ids, merges))
    backend.normalizer, backend.pre_tokenizer = normaliser, pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(added)
    return backend


def byte_level_steps(config: dict) -> tuple[normalizers.Normalizer | None, pre_tokenizers.PreTokenizer]:
    """How a text is prepared before bytes are merged. Raises ValueError where the files do not tell."""
    name, prefix = config.get("tokenizer_class") or "GPT2Tokenizer", bool(config.get("add_prefix_space"))
    if config.get("add_bos_token"):
        raise ValueError("add_bos_token is only supported in the form of a tokenizer.json")
    if name in ("GPT2Tokenizer", "GPT2TokenizerFast"):
        return None, pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if name in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):  # Qwen3 has Qwen2's
        split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
        return normalizers.NFC(), pre_tokenizers.Sequence([split, byte_level])
    raise ValueError(f"the tokenizer_class {name!r} is only supported in the form of a tokenizer.json")


def added_files(folder: Path) -> tuple[dict, dict[str, dict]]:
    """tokenizer_config.json, and the added tokens by id, also those of added_tokens.json, an older form."""
    config, more = ({} if not (folder / name).exists() else read_json_object(folder / name)
                    for name in ("tokenizer_config.json", "added_tokens.json"))
    older = {str(number): {"content": content} for content, number in more.items()}
    with readable_errors(folder / "tokenizer_config.json"):
        return config, {**older, **config.get("added_tokens_decoder", {})}


def with_no_more(folder: Path, backend: Tokenizer) -> Tokenizer:
    """The backend. Raises ValueError for added tokens that it lacks, which would be cut into pieces."""
    _, given = added_files(folder)
    with readable_errors(folder / "tokenizer_config.json"):
        for entry in given.values():
            if backend.token_to_id(entry["content"]) is None:
                raise ValueError(f"the added token {entry['content']!r} is not in spiece.model: it is only "
                                 "supported in the form of a tokenizer.json")
    return backend


def added_tokens(given: dict[str, dict],
                 vocabulary: dict[str, int]) -> tuple[list[AddedToken], dict[str, int]]:
    """The tokens never to split, and the vocabulary with them. Raises ValueError where they contradict it."""
    end = {"content": END_OF_TEXT, "special": True}
    entries = ({str(vocabulary[END_OF_TEXT]): end} if END_OF_TEXT in vocabulary else {}) | given
    tokens, ids, owners = [], dict(vocabulary), {number: piece for piece, number in vocabulary.items()}
    for number, entry in entries.items():
        content, number = entry["content"], int(number)
        fits = ids.setdefault(content, number) == number and owners.setdefault(number, content) == content
        if number not in IDS or not fits:
            raise ValueError(f"the added token {content!r}, id {number}, contradicts vocab.json or another")
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        tokens.append(AddedToken(content, **{flag: entry[flag] for flag in flags if flag in entry}))
    return tokens, ids


def read_json_object(path: Path) -> dict:
    content = read_json(path, UNREADABLE)
    if not isinstance(content, dict):
        raise ValueError(f"{path} {UNREADABLE}: it holds a {type(content).__name__} instead of an object")
    return content


def read_vocabulary(path: Path) -> dict[str, int]:
    """The ids of the pieces. Raises ValueError unless every piece has one of its own."""
    vocabulary = read_json_object(path)
    with readable_errors(path):
        if not vocabulary or not all(piece and type(number) is int and number in IDS
                                     for piece, number in vocabulary.items()):
            raise ValueError("it does not map pieces to their ids")
        if len(set(vocabulary.values())) < len(vocabulary):
            raise ValueError("it gives two pieces the same id")
    return vocabulary


def read_merges(path: Path, vocabulary: dict[str, int], added: set[str]) -> list[tuple[str, str]]:
    """The pairs of pieces, in order. Raises ValueError where the vocabulary is another tokenizer's."""
    lines = path.read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines[lines[0].startswith("#version"):] if line]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise ValueError(f"{' '.join(merge)!r} does not join two pieces of vocab.json to a third")
    made = {"".join(merge) for merge in merges} | added
    for piece in vocabulary:
        if len(piece) > 1 and piece not in made:  # else a truncated file would split words too finely
            raise ValueError(f"no line makes the piece {piece!r} of vocab.json")
    return merges


def read_sentencepiece(path: Path) -> Tokenizer:
    """T5's spiece.model, with sentinels: <extra_id_0> has the last id. Raises ValueError for other models."""
    with readable_errors(path):
        names, scores, types, charsmap = read_spiece(path.read_bytes())
        vocabulary = [*zip(names, scores), *((sentinel, 0.0) for sentinel in SENTINELS)]
        if len(dict(vocabulary)) < len(vocabulary) or "</s>" not in names or types.count(UNKNOWN) != 1:
            raise ValueError("a T5 has every piece once, among them </s>, a single one for unknown "
                             "characters, and no sentinels")
        backend = Tokenizer(models.Unigram(vocabulary, types.index(UNKNOWN)))
    check_growth(path, longest_replacement(charsmap))
    with readable_errors(path):
        if charsmap:
            backend.normalizer = normalizers.Precompiled(charsmap)
            backend.normalizer.normalize_str("".join(map(chr, range(0xD800))))  # a damaged table fails here
    splits = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", names.index("</s>"))])
    backend.add_special_tokens([name for name, kind in zip(names, types) if kind != NORMAL] + SENTINELS)
    return backend


def read_spiece(data: bytes) -> tuple[list[str], list[float], list[int], bytes]:
    """Pieces, their scores and types, and the normaliser's table. Raises ValueError if it is unlike T5's."""
    fields = read_fields(data)
    trainer, normaliser = read_fields(last(fields, 2, bytes)), read_fields(last(fields, 3, bytes))
    for settings, needed in ((trainer, TRAINER), (normaliser, NORMALISER)):
        for number, (name, value) in needed.items():
            found = last(settings, number, int, value)
            if found != value:
                raise ValueError(f"the setting {name} {found} is not supported, only {value}")
    pieces = [read_piece(entry) for entry in fields.get(1, [])]
    if len(pieces) != last(trainer, 4, int):
        raise ValueError(f"it has {len(pieces)} pieces, not the {last(trainer, 4, int)} that it announces")
    names, scores, types = map(list, zip(*pieces))
    return names, scores, types, last(normaliser, 2, bytes, b"")


def read_piece(entry: bytes) -> tuple[str, float, int]:
    fields = read_fields(entry)
    name, kind = last(fields, 1, bytes).decode(), last(fields, 3, int, NORMAL)
    score, = struct.unpack("<f", last(fields, 2, bytes))
    if kind not in (NORMAL, UNKNOWN, CONTROL):
        raise ValueError(f"the piece {name!r} has the unsupported type {OTHER_TYPES.get(kind, kind)}")
    if not name or not math.isfinite(score):
        raise ValueError(f"the piece {name!r} with the score {score} is damaged")
    return name, score, kind


def read_fields(data: bytes) -> dict[int, list[int | bytes]]:
    """A protobuf message → each field's values: int for varints, else bytes. Raises ValueError if damaged."""
    fields, at = {}, 0
    while at < len(data):
        key, at = read_varint(data, at)
        number, kind = key >> 3, key & 7
        if number == 0 or kind not in (0, 1, 2, 5):
            raise ValueError(f"it is damaged at byte {at}")
        value, at = read_varint(data, at) if kind in (0, 2) else ({1: 8, 5: 4}[kind], at)
        if kind != 0:  # then this number is a length
            value, at = data[at:at + value], at + value
        fields.setdefault(number, []).append(value)
    if at > len(data):
        raise ValueError("it ends in the middle of a field")
    return fields


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at byte `at`, seven bits a byte, lowest first, and where it ends. Raises ValueError."""
    value = 0
    for i, byte in enumerate(data[at:at + 10]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise ValueError("it ends, or is damaged, in the middle of a number")


def last(fields: dict[int, list[int | bytes]], number: int, kind: type,
         default: int | bytes | None = None) -> int | bytes:
    """A field's last value, the one that counts. Raises ValueError where it is absent without a default."""
    value = fields.get(number, [default])[-1]
    if not isinstance(value, kind):
        raise ValueError(f"its field {number} is missing or of another type")
    return value
