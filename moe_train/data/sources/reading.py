"""Any kind of source of text as a stream of rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from moe_train.data.sources.lines import TEXT, read_document, read_jsonl, read_lines
from moe_train.data.sources.parquet import parquet_columns, read_parquet, row_groups
from moe_train.data.sources.rows import Rows, SourceFile, Span
from moe_train.data.split import split_position

_COMPRESSED = 3
"""About how much smaller compressed text is."""
_LONGEST_SAMPLE = 20_000
_ALL = Span()


def read_rows(
    file: SourceFile, columns: Sequence[str], span: Span = _ALL, skip_damaged: bool = False
) -> Iterator[Rows]:
    """The rows of a part of a file in order, a bounded number at a time, numbered from the part's first.

    Plain text has the one column of `text_column`. A damaged parquet page is an error, or (``skip_damaged``) the rest
    of its row group is bad rows.
    Errors: ValueError naming file and row, where the file is damaged or is no text.
    """
    if file.kind == "parquet":
        return read_parquet(file, columns, span, skip_damaged)
    if file.kind == "jsonl":
        return read_jsonl(file, columns, span)
    if file.kind == "tokens":
        raise ValueError(f"{file.path} holds token ids, not text")
    return read_lines(file, span) if file.kind == "lines" else read_document(file)


def text_column(file: SourceFile, wanted: str) -> str:
    """The column that holds the text: the wanted one, where there is a choice."""
    return wanted if file.kind in ("parquet", "jsonl") else TEXT


def column_names(file: SourceFile) -> list[str] | None:
    """The columns of a file; None where any may be asked for, as objects of JSON differ.

    ValueError where it is damaged.
    """
    if file.kind == "parquet":
        return parquet_columns(file)
    return None if file.kind == "jsonl" else [TEXT]


def check_columns(file: SourceFile, columns: Sequence[str]) -> None:
    """ValueError where a file certainly lacks one of the columns."""
    have = column_names(file)
    missing = [name for name in columns if have is not None and name not in have]
    if have is not None and missing:
        raise ValueError(f"{file.path} has no column {', '.join(missing)}; it has {', '.join(have)}")


def text_bytes(file: SourceFile, columns: Sequence[str]) -> int:
    """About how many bytes of text these columns of a file hold."""
    if file.kind == "parquet":
        return sum(group.column_bytes for group in row_groups(file, columns))
    return file.size * (_COMPRESSED if file.compression else 1)


def first_texts(files: Sequence[SourceFile], columns: Sequence[str], count: int) -> list[str]:
    """Up to ``count`` texts of these columns, also inside lists and objects, from the beginnings of files that are
    spread evenly over all of them; of each its first 20,000 characters. Nothing only where there is no text at all."""
    files = [file for file in files if file.kind != "tokens"]
    chosen = files[:: max(1, len(files) // 16)]
    share = -(-count // max(1, len(chosen)))
    texts = [text for file in chosen for text in itertools.islice(_texts_of(file, columns), share)]
    if not texts:
        texts = list(itertools.islice((text for file in files for text in _texts_of(file, columns)), count))
    return [text[:_LONGEST_SAMPLE] for text in texts]


def _texts_of(file: SourceFile, columns: Sequence[str]) -> Iterator[str]:
    names = [text_column(file, column) for column in columns]
    check_columns(file, names)
    for rows in read_rows(file, names, skip_damaged=True):
        yield from _strings([rows.readable(name)[0] for name in names])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def sample_texts(files: Sequence[SourceFile], column: str, max_bytes: int, seed: int = 0) -> Iterator[str]:
    """Texts spread evenly over the files, about `max_bytes` of UTF-8 in all; what cannot be read and nulls are passed
    over. Deterministic; where not all are taken, ``seed`` decides which is the first."""
    total = 0
    for file in files:
        check_columns(file, [text_column(file, column)])
        total += text_bytes(file, [column])
    share = min(1.0, max_bytes / max(total, 1))
    due, number = -split_position("sample", seed), 0
    for file in files:
        name = text_column(file, column)
        for rows in read_rows(file, [name], skip_damaged=True):
            for text in rows.texts(name)[0].to_pylist():
                # Row n is taken where n * share passes an integer.
                number += 1
                if number * share >= due + 1:
                    due += 1
                    if text is not None:
                        yield text
