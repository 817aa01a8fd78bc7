"""What a tokenizer is to the rest of the system.

Suffixes: V vocabulary, D texts, N tokens of all texts in a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

IdArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Encoded:
    """The tokens of several texts, one text after the other."""

    ids_N: npt.NDArray[Any]
    """uint32 or int32."""
    lengths_D: npt.NDArray[np.int64]
    """Tokens of each text; they sum to N."""


class Tokenizer(ABC):
    """Text to ids and back. Text is only ever text: what spells a special token is encoded letter by letter."""

    path: Path
    checksum: str
    """Hexadecimal SHA-256 of what defines the tokenizer."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V: ids are 0 <= id < V."""

    @property
    @abstractmethod
    def eod_id(self) -> int:
        """The id that ends a document; never the encoding of text."""

    @property
    @abstractmethod
    def special_tokens(self) -> dict[str, int]:
        """Spelling -> id of the tokens that stand for no text."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[IdArray]:
        """One [tokens] int32 array per text, without an end-of-document id."""

    @abstractmethod
    def token_bytes_of(self, token: int) -> bytes:
        """The bytes of text that an id stands for; empty for special tokens."""

    def encode_column(self, texts: Any) -> Encoded:
        """As ``encode_batch`` for a pyarrow string array without nulls."""
        encoded = self.encode_batch(texts.to_pylist())
        lengths_D = np.array([len(ids) for ids in encoded], dtype=np.int64)
        return Encoded(np.concatenate(encoded) if encoded else np.zeros(0, np.int32), lengths_D)

    def piece(self, token: int) -> str:
        """How an id is shown to people: its text, or its name where it is special."""
        return self.token_bytes_of(token).decode("utf-8", errors="backslashreplace")

    def token_bytes(self) -> IdArray:
        """[V] int32: number of bytes of text that each id stands for."""
        return np.array([len(self.token_bytes_of(i)) for i in range(self.vocab_size)], dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens have none. Bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return b"".join(self.token_bytes_of(int(i)) for i in ids).decode("utf-8", errors="replace")
