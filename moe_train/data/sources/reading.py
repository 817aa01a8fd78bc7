"""Any kind of source as a stream of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moe_train.data.sources.lines import TEXT, read_document, read_jsonl, read_lines
from moe_train.data.sources.parquet import parquet_columns, read_parquet, text_bytes
from moe_train.data.sources.rows import Rows, SourceFile
from moe_train.data.split import split_position

_COMPRESSED = 3
"""About how much smaller compressed text is."""


def read_rows(file: SourceFile, columns: Sequence[str]) -> Iterator[Rows]:
    """The file's rows in order, some hundred at a time. Plain text has the one column of `text_column`.

    Errors: ValueError naming file and row, where the file is damaged or lacks a column.
    """
    if file.kind == "parquet":
        return read_parquet(file, columns)
    if file.kind == "jsonl":
        return read_jsonl(file, columns)
    return read_lines(file) if file.kind == "lines" else read_document(file)


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


def first_texts(files: Sequence[SourceFile], column: str, count: int) -> list[str]:
    """Up to ``count`` texts from the beginnings of files that are spread evenly over all of them."""
    chosen = files[:: max(1, len(files) // 16)]
    share = -(-count // max(1, len(chosen)))
    texts: list[str] = []
    for file in chosen:
        name = text_column(file, column)
        rows = next(iter(read_rows(file, [name])), None)
        texts += [text for text in (rows.values[name] if rows else []) if isinstance(text, str) and text][:share]
    return texts


def sample_texts(files: Sequence[SourceFile], column: str, max_bytes: int, seed: int = 0) -> Iterator[str]:
    """Texts spread evenly over the files, about `max_bytes` of UTF-8 in all; what cannot be read and nulls are passed
    over. Deterministic; where not all are taken, ``seed`` decides which is the first."""
    total = 0
    for file in files:
        have = column_names(file)
        if have is not None and text_column(file, column) not in have:
            raise ValueError(f"{file.path} has no column {column}; it has {', '.join(have)}")
        if file.kind == "parquet":
            total += text_bytes(file, column)
        else:
            total += file.size * (_COMPRESSED if file.path.suffix in (".gz", ".zst") else 1)
    share = min(1.0, max_bytes / max(total, 1))
    due, number = -split_position("sample", seed), 0
    for file in files:
        name = text_column(file, column)
        for rows in read_rows(file, [name]):
            for text in rows.values[name]:
                # Row n is taken where n * share passes an integer.
                number += 1
                if number * share >= due + 1:
                    due += 1
                    if isinstance(text, str):
                        yield text
