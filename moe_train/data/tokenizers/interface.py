"""What a tokenizer is to the rest of the system.

Suffixes: V vocabulary, D documents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

IdArray = npt.NDArray[np.int32]
LengthArray = npt.NDArray[np.int64]


class Tokenizer(ABC):
    """Text to ids and back. Text is only ever text: what spells a special token is encoded letter by letter."""

    path: Path
    checksum: str
    """Hexadecimal SHA-256 of what defines the tokenizer."""
    eod_id: int
    """The id that ends a document; never the encoding of text."""
    special_tokens: dict[str, int]
    """Spelling -> id of the tokens that stand for no text."""
    bytes_V: list[bytes]
    """The bytes of text that each id stands for; empty for special tokens."""
    threads: int | None = None
    """Of `encode_batch`, where the engine lets one choose; None for all cores."""

    @property
    def copy_name(self) -> str:
        """The file name under which a copy of it is read as the same tokenizer."""
        return f"tokenizer{self.path.suffix}"

    @property
    def vocab_size(self) -> int:
        """V: ids are 0 <= id < V."""
        return len(self.bytes_V)

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[IdArray]:
        """One [tokens] int32 array per text, without an end-of-document id."""

    def encode_column(self, texts_D: Any) -> tuple[npt.NDArray[Any], LengthArray]:
        """The ids of all texts one after the other (integers of some type), and the number of ids of each text.

        texts_D: an arrow large_string array without nulls.
        """
        encoded = self.encode_batch(texts_D.to_pylist())
        lengths_D = np.array([len(ids) for ids in encoded], np.int64)
        ids = np.concatenate([*encoded, np.zeros(0, np.int32)])
        assert int(ids.max(initial=0)) < self.vocab_size, "a token outside the vocabulary"
        return ids, lengths_D

    def piece(self, token: int) -> str:
        """How an id is shown to people: its text, or its name where it is special."""
        if self.bytes_V[token]:
            return self.bytes_V[token].decode("utf-8", errors="backslashreplace")
        names = {number: spelling for spelling, number in self.special_tokens.items()}
        return names.get(token, f"<unused {token}>")

    def token_bytes(self) -> IdArray:
        """[V] int32: number of bytes of text that each id stands for."""
        return np.array([len(content) for content in self.bytes_V], dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens have none. Bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return b"".join(self.bytes_V[int(i)] for i in ids).decode("utf-8", errors="replace")


def check_unicode(text: str, where: str) -> None:
    """ValueError where a text holds half of a surrogate pair: JSON can spell it, and bytes of a command line that are
    no UTF-8 become such, but it is no character and no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        near = text[max(error.start - 20, 0) : error.start + 20]
        raise ValueError(f"{where} is not valid Unicode at character {error.start}: {near!r}") from None
