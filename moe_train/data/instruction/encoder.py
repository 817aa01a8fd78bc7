"""Batches of rows to token ids, each conversation one document, with a mask of the tokens that the loss counts.

Suffixes: D documents, N tokens of all documents, P pieces of all documents.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moe_train.data.instruction.conversation import Message, Unusable
from moe_train.data.instruction.formats import FORMATS, PUBLISHED, Format, MessagesFormat, PairFormat
from moe_train.data.instruction.templates import END_OF_DOCUMENT, TEMPLATES, Piece
from moe_train.data.tokenizers import IdArray, Tokenizer


@dataclass(frozen=True)
class InstructionOptions:
    format: str
    """Where a row holds its conversation: one of `FORMATS`."""
    chat_template: str
    """How it is written: one of `TEMPLATES`."""
    messages_column: str = "messages"
    """Of the format `messages`."""
    prompt_column: str = "prompt"
    """This and the next: of the format `prompt-response`."""
    response_column: str = "response"
    loss_turns: Literal["all", "last"] = "all"
    """Which answers of a conversation the loss counts."""

    @property
    def columns(self) -> list[str]:
        """The columns that hold a conversation. ValueError for an unknown format."""
        return _format(self).columns


@dataclass(frozen=True)
class EncodedBatch:
    """The conversations of a batch, joined."""

    ids_N: IdArray
    lengths_D: npt.NDArray[np.int64]
    """Tokens of each document, at least one; they add up to N."""
    loss_mask_N: npt.NDArray[np.uint8]
    """1 where a token counts in the loss (as what is predicted, not as what is read), else 0."""
    text_bytes_D: npt.NDArray[np.int64]
    """Bytes of text of each document in UTF-8, headers of turns included, special tokens not."""
    rows_D: npt.NDArray[np.int64]
    """The place in the batch that each document comes from, increasing."""
    bad: dict[int, str]
    """Place in the batch -> why this row is no conversation."""


class InstructionEncoder:
    """Rows with the columns `columns` to token ids.

    Errors: ValueError for an unknown format or template, and for a special token that the template needs and the
    tokenizer lacks.
    """

    def __init__(self, options: InstructionOptions, tokenizer: Tokenizer) -> None:
        self.options, self.tokenizer = options, tokenizer
        self._format, self.columns = _format(options), options.columns
        if options.chat_template not in TEMPLATES:
            raise ValueError(f"unknown chat template {options.chat_template!r}; known are {', '.join(TEMPLATES)}")
        if options.loss_turns not in ("all", "last"):
            raise ValueError(f"the loss counts all or the last answers of a conversation, not {options.loss_turns!r}")
        self._template = TEMPLATES[options.chat_template]
        missing = [token for token in self._template.special if token not in tokenizer.special_tokens]
        if missing:
            raise ValueError(
                f"the chat template {options.chat_template} needs the special token {' and '.join(missing)}, which "
                f"{tokenizer.path} lacks; its special tokens are {', '.join(tokenizer.special_tokens) or 'none'}"
            )
        self._special = dict(tokenizer.special_tokens) | {END_OF_DOCUMENT: tokenizer.eod_id}
        # A tokenizer may end documents with what ends a turn; a document is not ended twice.
        ends = self._special[self._template.end_of_turn] == tokenizer.eod_id
        self._end = () if ends else (Piece(END_OF_DOCUMENT, "special"),)

    def encode(self, batch: dict[str, list[Any]]) -> EncodedBatch:
        """batch: for each column a value per row. Every row is in the result, as a document or among the bad ones."""
        documents: list[list[Piece]] = []
        rows: list[int] = []
        bad: dict[int, str] = {}
        for row, values in enumerate(zip(*(batch[name] for name in self.columns), strict=True)):
            try:
                messages = self._format.read(dict(zip(self.columns, values, strict=True)))
            except Unusable as error:
                bad[row] = str(error)
            else:
                documents.append(self._pieces(messages))
                rows.append(row)
        return self._joined(documents, rows, bad)

    def _pieces(self, messages: list[Message]) -> list[Piece]:
        """Rendered, with neighbouring text of the same kind in one piece, as it would stand in a prompt."""
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        counted = set(answers if self.options.loss_turns == "all" else answers[-1:])
        rendered = self._template.render(messages, [index in counted for index in range(len(messages))])
        pieces: list[Piece] = []
        for piece in itertools.chain(rendered, self._end):
            if piece.kind == "mark":
                piece = Piece(piece.text, "special" if piece.text in self._special else "text", piece.counted)
            if pieces and piece.kind == pieces[-1].kind == "text" and piece.counted == pieces[-1].counted:
                piece = Piece(pieces.pop().text + piece.text, "text", piece.counted)
            pieces.append(piece)
        return pieces

    def _joined(self, documents: list[list[Piece]], rows: list[int], bad: dict[int, str]) -> EncodedBatch:
        pieces = [piece for document in documents for piece in document]
        # Headers occur again and again.
        texts = list(dict.fromkeys(piece.text for piece in pieces if piece.kind == "text"))
        ids_of = dict(zip(texts, self.tokenizer.encode_batch(texts), strict=True)) if texts else {}
        bytes_of = {text: len(text.encode()) for text in texts}
        special = {name: np.array([token], np.int32) for name, token in self._special.items()}
        encoded = [(ids_of if piece.kind == "text" else special)[piece.text] for piece in pieces]

        sizes_P = np.array([len(ids) for ids in encoded], np.int64)
        bytes_P = np.array([bytes_of[p.text] if p.kind == "text" else 0 for p in pieces], np.int64)
        counted_P = np.array([piece.counted for piece in pieces], np.uint8)
        # A document has at least one piece, so that each of these starts is one of a document.
        starts_D = np.cumsum([0, *(len(document) for document in documents)])[:-1]
        return EncodedBatch(
            ids_N=np.concatenate([np.zeros(0, np.int32), *encoded]),
            lengths_D=np.add.reduceat(sizes_P, starts_D) if documents else np.zeros(0, np.int64),
            loss_mask_N=np.repeat(counted_P, sizes_P),
            text_bytes_D=np.add.reduceat(bytes_P, starts_D) if documents else np.zeros(0, np.int64),
            rows_D=np.array(rows, np.int64),
            bad=bad,
        )


def _format(options: InstructionOptions) -> Format:
    if options.format == "messages":
        return MessagesFormat(options.messages_column)
    if options.format == "prompt-response":
        return PairFormat(options.prompt_column, options.response_column)
    if options.format not in PUBLISHED:
        raise ValueError(f"unknown instruction format {options.format!r}; known are {', '.join(FORMATS)}")
    return PUBLISHED[options.format]
