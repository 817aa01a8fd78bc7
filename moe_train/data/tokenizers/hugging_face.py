"""Hugging Face `tokenizer.json` files, as GPT-2, Qwen3, Llama 3 and most others are published.

The engine is the `tokenizers` package, which also defines what is right for the faster one (gigatoken_engine.py).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_train.data.files import sha256_of
from moe_train.data.tokenizers.byte_level import bytes_of_piece
from moe_train.data.tokenizers.interface import IdArray, Tokenizer

FILE = "tokenizer.json"
_SPACE_MARK = "\u2581"


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, or a folder that holds one and perhaps `tokenizer_config.json` beside it.

    ``eod_token``: spelling of the token that ends documents. Without it: `eos_token` of `tokenizer_config.json`, or the
    only special token. Errors: FileNotFoundError; ImportError that names the extra; ValueError for a damaged file, an
    unknown kind of vocabulary, or where the end of documents is not clear.
    """

    def __init__(self, path: str | Path, eod_token: str | None = None) -> None:
        path = Path(path)
        self.path = path / FILE if path.is_dir() else path
        if not self.path.is_file():
            raise FileNotFoundError(f"tokenizer {self.path} does not exist")
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(f"{self.path} needs the package tokenizers: pip install 'moe-train[data]'") from error
        try:
            self._config: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            self._engine: Any = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ValueError(f"{self.path} is not a tokenizer.json, or it is damaged: {error}") from error
        self._engine.encode_special_tokens = True
        self._engine.no_truncation()
        self._engine.no_padding()
        self.checksum = sha256_of(self.path)
        self.special_tokens = {
            t["content"]: int(t["id"]) for t in self._config.get("added_tokens") or [] if t["special"]
        }
        self.bytes_V = self._vocabulary()
        self.eod_id = self._end_of_document(eod_token)

    def encode_batch(self, texts: Sequence[str]) -> list[IdArray]:
        encoded = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int32) for one in encoded]

    def start_ids(self) -> list[int]:
        """Special tokens that the file's own template puts in front of a text, often none."""
        encoded = self._engine.encode("a")
        return list(itertools.takewhile(set(self.special_tokens.values()).__contains__, encoded.ids))

    def _vocabulary(self) -> list[bytes]:
        """[V] bytes of text per id; an id without a token stands for none."""
        pieces = self._engine.get_vocab(with_added_tokens=False)
        added_tokens = self._config.get("added_tokens") or []
        added = {int(t["id"]): t["content"].encode() for t in added_tokens if not t["special"]}
        size = 1 + max([*pieces.values(), *added, *self.special_tokens.values()])
        read = self._reader()
        found = [b""] * size
        for piece, token in pieces.items():
            if piece not in self.special_tokens:
                found[token] = read(piece)
        for token, content in added.items():
            found[token] = content
        return found

    def _reader(self) -> Any:
        """How a piece of the vocabulary spells bytes, which the decoder says."""
        kinds = set(_types(self._config.get("decoder"))) | set(_types(self._config.get("pre_tokenizer")))
        if "ByteLevel" in kinds:
            return bytes_of_piece
        if self._config.get("model", {}).get("byte_fallback"):
            return _bytes_of_sentencepiece
        kind = self._config.get("model", {}).get("type")
        raise ValueError(
            f"{self.path} is a {kind} model without ByteLevel or byte fallback: its tokens do not spell bytes, so that "
            "bits per byte are not known"
        )

    def _end_of_document(self, wanted: str | None) -> int:
        beside = self.path.with_name("tokenizer_config.json")
        if wanted is None and beside.is_file():
            named = json.loads(beside.read_text(encoding="utf-8")).get("eos_token")
            wanted = named.get("content") if isinstance(named, dict) else named
        if wanted is None and len(self.special_tokens) == 1:
            wanted = next(iter(self.special_tokens))
        if wanted is None:
            known = ", ".join(self.special_tokens) or "none"
            raise ValueError(f"{self.path} does not say which token ends a document; name it by --eod-token ({known})")
        if wanted not in self.special_tokens:
            known = ", ".join(self.special_tokens) or "none"
            raise ValueError(f"{self.path} has no special token {wanted!r}; its special tokens are {known}")
        return self.special_tokens[wanted]


def _types(part: Any) -> Iterator[str]:
    """Types of a component and of all inside it."""
    if isinstance(part, dict):
        if "type" in part:
            yield part["type"]
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from _types(inner)


def _bytes_of_sentencepiece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_SPACE_MARK, " ").encode()
