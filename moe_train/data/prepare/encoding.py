"""Rows to documents of token ids, whatever the rows hold.

Suffixes: N rows that were read, D documents.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_train.data.indexed import token_dtype
from moe_train.data.instruction import InstructionEncoder
from moe_train.data.prepare.choice import choose, sides
from moe_train.data.prepare.options import PrepareOptions
from moe_train.data.prepare.runs import LOSS, TOKENS
from moe_train.data.sources import Rows, SourceFile, Span, read_rows, text_column
from moe_train.data.sources.tokens import read_token_array
from moe_train.data.tokenizers import Tokenizer

_TOKENS_PER_BATCH = 4 << 20

Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Documents:
    """What a batch of rows became."""

    rows: int
    """Rows that were read, used or not."""
    streams: dict[str, npt.NDArray[Any]]
    """The documents one after the other: their token ids, and what goes with each."""
    lengths_D: Lengths
    splits_D: npt.NDArray[np.int8]
    sizes_D: Lengths
    """Bytes of text."""
    rows_D: Lengths
    """From the first row that was asked for."""
    ids_D: Any
    domains_D: Any
    skipped: Counter[str] = field(default_factory=Counter)
    left_out: dict[int, str] = field(default_factory=dict)
    """Row -> reason, of those that are left out for what they hold."""
    bad: frozenset[int] = frozenset()
    """Those of them that cannot be read at all."""
    read_bytes: int = 0
    """Of text, used or not."""

    def end_row(self, tokens: int | None) -> int | None:
        """The row of the first document that goes beyond so many tokens; None where all fit."""
        if tokens is None or int(self.lengths_D.sum()) <= tokens:
            return None
        return int(self.rows_D[np.searchsorted(np.cumsum(self.lengths_D), tokens, side="right")])


def read_documents(
    file: SourceFile, span: Span, tokenizer: Tokenizer, options: PrepareOptions, limit: int | None
) -> Iterator[Documents]:
    """The documents of a part of a file, the first ``limit`` of them.

    Errors: ValueError naming the file, where it is damaged or is not what it should be.
    """
    if options.instruction is not None:
        return _conversations(file, span, tokenizer, options, limit)
    if file.kind == "tokens":
        return _token_documents(file, tokenizer, options, limit)
    return _text_documents(file, span, tokenizer, options, limit)


def streams(options: PrepareOptions) -> list[str]:
    """What is written beside each other for each token."""
    return [TOKENS] if options.instruction is None else [TOKENS, LOSS]


def _text_documents(
    file: SourceFile, span: Span, tokenizer: Tokenizer, options: PrepareOptions, limit: int | None
) -> Iterator[Documents]:
    import pyarrow.compute as pc

    column = text_column(file, options.text_column)
    left = limit
    for rows in read_rows(file, [column, *options.columns], span, skip_damaged=options.on_bad == "skip"):
        texts_N, bad = rows.texts(column)
        bad = rows.bad | bad
        choice = choose(rows, texts_N, bad, options)
        if left is not None and choice.keep_N.sum() >= left:
            # As if the rows behind the last document had not been read.
            count = int(np.flatnonzero(choice.keep_N)[left - 1]) + 1 if left else 0
            rows, texts_N = rows.first(count), texts_N[:count]
            bad = {place: reason for place, reason in bad.items() if place < count}
            choice = choose(rows, texts_N, bad, options)
        places_D = np.flatnonzero(choice.keep_N)
        ids_N, domains_N = rows.names(options.id_column), pc.fill_null(rows.names(options.domain_column), "")
        if len(places_D) == rows.count:
            texts_D, ids_D, domains_D = texts_N, ids_N, domains_N
        else:
            texts_D, ids_D, domains_D = (one.take(places_D) for one in (texts_N, ids_N, domains_N))
        ids, lengths_D = _ended(*tokenizer.encode_column(texts_D), tokenizer, options)
        yield Documents(
            rows=rows.count,
            streams={TOKENS: ids},
            lengths_D=lengths_D,
            splits_D=sides(rows, texts_N, places_D, options),
            sizes_D=pc.binary_length(texts_D).to_numpy(),
            rows_D=rows.first_row + places_D,
            ids_D=ids_D,
            domains_D=domains_D,
            skipped=choice.skipped,
            left_out={rows.first_row + place: reason for place, reason in choice.left_out.items()},
            bad=frozenset(rows.first_row + place for place in bad),
            read_bytes=pc.sum(pc.binary_length(texts_N)).as_py() or 0,
        )
        if left is not None:
            left -= len(places_D)
            if left <= 0:
                return


def _conversations(
    file: SourceFile, span: Span, tokenizer: Tokenizer, options: PrepareOptions, limit: int | None
) -> Iterator[Documents]:
    import pyarrow as pa
    import pyarrow.compute as pc

    assert options.instruction is not None
    encoder = InstructionEncoder(options.instruction, tokenizer)
    left = limit
    for rows in read_rows(file, [*encoder.columns, *options.columns], span, skip_damaged=options.on_bad == "skip"):
        while True:
            columns = {name: rows.readable(name) for name in encoder.columns}
            bad = dict(rows.bad)
            for _, unreadable in columns.values():
                bad |= unreadable
            batch = {name: values for name, (values, _) in columns.items()}
            # The content stands for a row that has no name of its own.
            texts_N = pa.array(
                [json.dumps(row, default=str) for row in zip(*batch.values(), strict=True)], pa.large_string()
            )
            choice = choose(rows, texts_N, bad, options)
            kept = np.flatnonzero(choice.keep_N)
            encoded = encoder.encode({name: [values[place] for place in kept] for name, values in batch.items()})
            if left is None or len(encoded.rows_D) < left:
                break
            # As if the rows behind the last document had not been read.
            count = int(kept[encoded.rows_D[left - 1]]) + 1 if left else 0
            if count == rows.count:
                break
            rows = rows.first(count)
        unusable = {int(kept[place]): reason for place, reason in encoded.bad.items()}
        choice.skipped.update(unusable.values())
        places_D = kept[encoded.rows_D]
        yield Documents(
            rows=rows.count,
            streams={TOKENS: encoded.ids_N.astype(token_dtype(tokenizer.vocab_size)), LOSS: encoded.loss_mask_N},
            lengths_D=encoded.lengths_D,
            splits_D=sides(rows, texts_N, places_D, options),
            sizes_D=encoded.text_bytes_D,
            rows_D=rows.first_row + places_D,
            ids_D=rows.names(options.id_column).take(places_D),
            domains_D=pc.fill_null(rows.names(options.domain_column), "").take(places_D),
            skipped=choice.skipped,
            left_out={rows.first_row + place: why for place, why in (choice.left_out | unusable).items()},
            bad=frozenset(rows.first_row + place for place in (*bad, *unusable)),
            read_bytes=pc.sum(pc.binary_length(texts_N)).as_py() or 0,
        )
        if left is not None:
            left -= len(places_D)
            if left <= 0:
                return


def _token_documents(
    file: SourceFile, tokenizer: Tokenizer, options: PrepareOptions, limit: int | None
) -> Iterator[Documents]:
    """The rows of an array are documents; none is left out, and they are named by their place."""
    import pyarrow as pa

    array = read_token_array(file)
    count, length = array.shape
    count = count if limit is None else min(count, limit)
    step = max(1, _TOKENS_PER_BATCH // max(1, length))
    for start in range(0, count, step):
        values = np.asarray(array[start : min(start + step, count)])
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < tokenizer.vocab_size:
            raise ValueError(f"{file.path} has token ids outside the tokenizer's 0 <= id < {tokenizer.vocab_size}")
        number = len(values)
        ids, lengths_D = _ended(values.reshape(-1), np.full(number, length, np.int64), tokenizer, options)
        places_D = np.arange(start, start + number)
        names = pa.array([f"{file.name}:{place}" for place in places_D], pa.large_string())
        nothing = Rows(start, number, {options.id_column: names})
        yield Documents(
            rows=number,
            streams={TOKENS: ids},
            lengths_D=lengths_D,
            splits_D=sides(nothing, names, np.arange(number), options),
            sizes_D=np.zeros(number, np.int64),
            rows_D=places_D,
            ids_D=pa.nulls(number, pa.large_string()),
            domains_D=pa.array([""] * number, pa.large_string()),
            read_bytes=values.nbytes,
        )


def _ended(
    ids: npt.NDArray[Any], lengths_D: Lengths, tokenizer: Tokenizer, options: PrepareOptions
) -> tuple[npt.NDArray[Any], Lengths]:
    """Ids in the type that they are stored in, each document with its end."""
    import pyarrow as pa
    import pyarrow.compute as pc

    ids = ids.astype(token_dtype(tokenizer.vocab_size), copy=False)
    if not options.append_eod:
        return ids, lengths_D
    offsets = np.concatenate([[0], np.cumsum(lengths_D)]) * ids.itemsize
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(ids))]
    documents_D = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(lengths_D), buffers)
    end = pa.scalar(ids.dtype.type(tokenizer.eod_id).tobytes(), pa.large_binary())
    # Arrow copies whole documents, where numpy's insert goes through a mask of all tokens.
    ended_D = pc.binary_join_element_wise(documents_D, end, pa.scalar(b"", pa.large_binary()))
    return np.frombuffer(ended_D.buffers()[2], ids.dtype)[: len(ids) + len(lengths_D)], lengths_D + 1
