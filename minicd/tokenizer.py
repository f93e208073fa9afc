"""Text ↔ token ids, on top of the `tokenizers` library. hf/tokenizers.py reads the files."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, processors

from .runtime.files import atomic_bytes

MOST_TOKENS = 100  # of a character: the longest, U+FDFA, becomes 18 letters of 33 bytes, maybe all tokens
ENCODED_AT_ONCE = 256  # texts between two looks at how long they became


class Rendered(str):
    """A prompt as a chat template wrote it: it has its special tokens, and none is added."""


class TextTokenizer:
    """Encodes prompts and answers. The stop token ends answers and, in encoder-decoders, prompts."""

    def __init__(self, backend: Tokenizer, eos: str | None = "</s>", pad: str | None = "<pad>",
                 ends_prompts: bool = True):
        """None: there is no such token. `ends_prompts` False: for a decoder, which would stop there."""
        self.backend, self.ends_prompts = backend, ends_prompts
        self.files: dict[str, bytes] = {}  # what else its folder says of chats and sampling, for `save`
        self.eos_id, self.pad_id = (None if token is None else backend.token_to_id(token)
                                    for token in (eos, pad))
        for token, number in ((eos, self.eos_id), (pad, self.pad_id)):
            if token is not None and number is None:
                raise ValueError(f"the tokenizer has no {token} token, which the model needs")

    def __len__(self) -> int:
        """One more than the highest id: how many rows an embedding needs. Ids may have gaps."""
        return max(self.backend.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """A prompt → its ids."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        added = [not isinstance(text, Rendered) for text in texts]
        if len(set(added)) > 1:
            return [self.encode(text) for text in texts]
        encodings = self.encodings(texts, add_special_tokens=all(added))
        return [self.prompt_ids(encoding) for encoding in encodings]

    def encodings(self, texts: Sequence[str], **how) -> list[Encoding]:
        """The backend's. Raises ValueError for far too many tokens, as of a malicious normaliser."""
        found: list[Encoding] = []
        for start in range(0, len(texts), ENCODED_AT_ONCE):
            some = list(texts[start : start + ENCODED_AT_ONCE])
            found += self.backend.encode_batch(some, **how)
            for text, encoding in zip(some, found[start:]):
                if len(encoding) > MOST_TOKENS * (len(text) + 1):
                    raise ValueError(f"the tokenizer makes {len(encoding)} tokens of a text of {len(text)} "
                                     "characters: it is damaged or malicious")
        return found

    def prompt_ids(self, encoding: Encoding) -> list[int]:
        """The ids of a prompt, with a stop token at the end, or without the one that the backend appended."""
        ids = encoding.ids
        if self.ends_prompts:
            return self.with_eos(ids)
        appended = ids[-1:] == [self.eos_id] and encoding.special_tokens_mask[-1]  # 0: it is part of the text
        return ids[:-1] if appended else ids

    def encode_answer(self, text: str) -> list[int]:
        """An answer → its ids, the stop token last. A decoder's has no start token: it continues a prompt."""
        return self.encode_answers([text])[0]

    def encode_answers(self, texts: Sequence[str]) -> list[list[int]]:
        if self.ends_prompts:
            return self.encode_all(texts)
        encodings = self.encodings(texts, add_special_tokens=False)
        return [self.with_eos(encoding.ids) for encoding in encodings]

    def with_eos(self, ids: list[int]) -> list[int]:
        return ids if self.eos_id is None or ids[-1:] == [self.eos_id] else ids + [self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids → text, without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def unknown_words(self, text: str) -> list[str]:
        """Parts of the text for which the vocabulary has no token but <unk>: the model cannot see them."""
        unknown, encoding = self.backend.token_to_id("<unk>"), self.backend.encode(text)
        found = [text[a:b] for i, (a, b) in zip(encoding.ids, encoding.offsets) if i == unknown]
        return list(dict.fromkeys(found))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token by itself; U+FFFD stands for part of a character."""
        if isinstance(self.backend.decoder, decoders.ByteLevel):
            return self.backend.decode_batch([[i] for i in ids], skip_special_tokens=False)
        return [(self.backend.id_to_token(i) or "").replace("\u2581", " ") for i in ids]

    def save(self, path: Path) -> None:
        atomic_bytes(path, self.backend.to_str(pretty=True).encode())


def word_tokenizer(words: Sequence[str]) -> TextTokenizer:
    """One token per word, words separated by spaces; their ids follow <pad> 0, </s> 1, <unk> 2, in order."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return TextTokenizer(backend)
