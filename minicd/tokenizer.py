"""Text ↔ token ids, on top of the `tokenizers` library."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers, processors

from .files import atomic_bytes


class TextTokenizer:
    """A tokenizer whose `encode` ends every text with the stop token, as T5 expects of prompts and answers alike."""

    def __init__(self, backend: Tokenizer, eos: str = "</s>", pad: str = "<pad>"):
        self.backend = backend
        self.eos_id, self.pad_id = backend.token_to_id(eos), backend.token_to_id(pad)
        for token, number in ((eos, self.eos_id), (pad, self.pad_id)):
            if number is None:
                raise ValueError(f"the tokenizer has no {token} token, which T5 needs")

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        """Read a `tokenizer.json`. Raises ValueError where the file is no tokenizer."""
        try:
            tokenizer = cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a readable tokenizer: {error}") from None
        tokenizer.backend.no_padding()
        tokenizer.backend.no_truncation()
        return tokenizer

    def __len__(self) -> int:
        """One more than the highest id: the rows that an embedding must have. Ids may have gaps."""
        return max(self.backend.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        return self.with_eos(self.backend.encode(text).ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.with_eos(encoding.ids) for encoding in self.backend.encode_batch(list(texts))]

    def with_eos(self, ids: list[int]) -> list[int]:
        return ids if ids and ids[-1] == self.eos_id else ids + [self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids → text, without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token by itself, without the mark for a leading space."""
        return [(self.backend.id_to_token(i) or "").replace("\u2581", "") for i in ids]

    def save(self, path: Path) -> None:
        atomic_bytes(path, self.backend.to_str(pretty=True).encode())


def word_tokenizer(words: Sequence[str]) -> TextTokenizer:
    """One token per word, words separated by spaces; ids in the order given after <pad> 0, </s> 1, <unk> 2."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return TextTokenizer(backend)
