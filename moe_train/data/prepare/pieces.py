"""The work, cut into pieces that any process can do by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_train.data.sources import SourceFile, Span, text_bytes
from moe_train.data.sources.parquet import row_groups

PIECE_BYTES = 64 << 20


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one file: row groups of parquet, bytes of uncompressed lines, else the whole file."""

    file: int
    """Place in the list of sources."""
    span: Span
    text_bytes: int
    """About so much text it holds; for progress only."""


def plan(files: Sequence[SourceFile], columns: Sequence[str], piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """Pieces of about so much text, in source order. The result of the work does not depend on how it is cut."""
    return [piece for number, file in enumerate(files) for piece in _cut(number, file, columns, piece_bytes)]


def _cut(number: int, file: SourceFile, columns: Sequence[str], piece_bytes: int) -> Iterator[Piece]:
    if file.kind == "parquet":
        groups = row_groups(file, columns)
        start, size = 0, 0
        for group, facts in enumerate(groups):
            size += facts.column_bytes
            if size >= piece_bytes or group == len(groups) - 1:
                yield Piece(number, Span(start, group + 1), size)
                start, size = group + 1, 0
    elif file.kind in ("jsonl", "lines") and file.compression is None and file.size > piece_bytes:
        for start in range(0, file.size, piece_bytes):
            stop = min(start + piece_bytes, file.size)
            yield Piece(number, Span(start, stop), stop - start)
    elif file.kind in ("tokens", "document") or file.size:
        yield Piece(number, Span(), file.size if file.kind == "tokens" else text_bytes(file, columns))
