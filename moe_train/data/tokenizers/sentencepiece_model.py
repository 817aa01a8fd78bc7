"""Sentencepiece models: reading and training them.

Newlines, tabs and runs of spaces are ordinary characters here: a trained model has pieces such as `):` + newline or
eight spaces, and what has no piece is spelled in bytes. Nothing is normalised and no space is put in front, so
decode(encode(text)) == text, and the token bytes of a text add up to its length in UTF-8.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_train.data.files import sha256_of, write_atomically
from moe_train.data.tokenizers.interface import IdArray, Tokenizer, check_unicode

END_OF_DOCUMENT = "<|endoftext|>"
_SPACE_MARK = "\u2581"  # sentencepiece writes a space as this character inside its pieces
_MAX_SENTENCE_BYTES = 4000


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model` file; its end-of-sentence symbol ends documents, or the control symbol ``eod_token``.

    Errors: FileNotFoundError; ValueError for a file that is no such model or that has no such symbol.
    """

    def __init__(self, path: str | Path, eod_token: str | None = None) -> None:
        import sentencepiece

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"tokenizer {self.path} does not exist")
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{self.path} is not a sentencepiece model, or it is damaged") from error
        self.eod_id = int(self._model.eos_id())
        if eod_token is not None:
            self.eod_id = int(self._model.piece_to_id(eod_token))
            if not self._model.is_control(self.eod_id):
                raise ValueError(f"{self.path} has no control symbol {eod_token!r} that could end documents")
        elif self.eod_id < 0:
            raise ValueError(f"{self.path} has no end-of-sentence symbol; name what ends documents by --eod-token")
        self.checksum = sha256_of(self.path)
        size = int(self._model.vocab_size())
        self.bytes_V = [self._bytes_of(token) for token in range(size)]
        textless = (self._model.is_control, self._model.is_unknown, self._model.is_unused)
        self.special_tokens = {
            str(self._model.id_to_piece(i)): i for i in range(size) if any(is_so(i) for is_so in textless)
        }
        self._ids_of_space_mark = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[IdArray]:
        encoded = self._model.encode(list(texts), num_threads=self.threads or os.cpu_count() or 1)
        for index, text in enumerate(texts):
            if _SPACE_MARK in text:
                encoded[index] = self._encode_with_space_mark(text)
        return [np.array(ids, dtype=np.int32) for ids in encoded]

    def _encode_with_space_mark(self, text: str) -> list[int]:
        """Spells U+2581 in bytes: sentencepiece itself would turn it into a space."""
        parts = self._model.encode(text.split(_SPACE_MARK))
        ids: list[int] = list(parts[0])
        for part in parts[1:]:
            ids += self._ids_of_space_mark
            ids += part
        return ids

    def _bytes_of(self, token: int) -> bytes:
        model = self._model
        if model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
            return b""
        if model.is_byte(token):
            return bytes([int(model.id_to_piece(token)[3:5], 16)])
        return str(model.id_to_piece(token)).replace(_SPACE_MARK, " ").encode()


def train_sentencepiece(
    texts: Iterable[str],
    output: str | Path,
    vocab_size: int,
    *,
    model_type: Literal["bpe", "unigram"] = "bpe",
    special_tokens: Sequence[str] = (),
    character_coverage: float = 0.9995,
) -> SentencePieceTokenizer:
    """Trains a model with byte fallback, identity normalisation and no dummy prefix.

    The same texts and options give the same bytes.
    vocab_size: V, of which 256 are bytes, one is unknown (never used), one ends documents (id 1), and then come the
    ``special_tokens`` (from id 2 on, in their order), which no text is ever encoded to.
    character_coverage: share of the text's characters that get a piece of their own; rarer ones are spelled in bytes.
    Errors: ValueError where the texts are too few for so many pieces, for special tokens that are taken, empty or hold
    white space, and for a coverage outside of what sentencepiece takes (0.98 to 1).
    """
    import io

    import sentencepiece

    _check_special(special_tokens)
    special = 2 + len(special_tokens)
    if vocab_size < 258 + special:
        raise ValueError(f"a vocabulary of {vocab_size} is too small: 256 bytes, {special} special tokens, letters")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            model_type=model_type,
            control_symbols=list(special_tokens),
            character_coverage=character_coverage,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2 * _MAX_SENTENCE_BYTES,
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_DOCUMENT,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().rpartition("] ")[2] or str(error)
        raise ValueError(f"sentencepiece could not train {vocab_size} pieces on this text: {reason}") from error
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, model.getvalue())
    return SentencePieceTokenizer(path)


def _check_special(special_tokens: Sequence[str]) -> None:
    taken = {"<unk>", END_OF_DOCUMENT, *(f"<0x{byte:02X}>" for byte in range(256))}
    for token in special_tokens:
        check_unicode(token, "a special token")
        if not token or token.split() != [token] or _SPACE_MARK in token:
            raise ValueError(f"a special token is a word without white space, not {token!r}")
        if token in taken:
            raise ValueError(f"the special token {token} is there already")
        taken.add(token)


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of text below the trainer's limit, cut behind newlines where possible (it drops longer ones)."""
    for text in texts:
        lines: list[str] = []
        size = 0
        for line in text.splitlines(keepends=True):
            # A character has at most four bytes.
            for begin in range(0, len(line), _MAX_SENTENCE_BYTES // 4):
                part = line[begin : begin + _MAX_SENTENCE_BYTES // 4]
                if lines and size + len(part.encode()) > _MAX_SENTENCE_BYTES:
                    yield "".join(lines)
                    lines, size = [], 0
                lines.append(part)
                size += len(part.encode())
        if lines:
            yield "".join(lines)
