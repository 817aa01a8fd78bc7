"""The work, cut into pieces that any process can do by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_train.data.sources import SourceFile, Span, text_bytes
from moe_train.data.sources.parquet import row_groups

PIECE_BYTES = 64 << 20
_FILES = 1000
"""At most so many small files in a piece."""


@dataclass(frozen=True)
class Piece:
    """Consecutive rows: a part of one file (row groups of parquet, bytes of uncompressed lines), or whole files."""

    spans: tuple[tuple[int, Span], ...]
    """(place in the list of sources, what is read of it)."""
    whole: bool
    """Whether all of each file is in this piece."""
    text_bytes: int
    """About so much text it holds; for progress only."""

    @property
    def files(self) -> list[int]:
        return [file for file, _ in self.spans]


def plan(files: Sequence[SourceFile], columns: Sequence[str], piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """Pieces of about so much text, in source order. The result of the work does not depend on how it is cut."""
    pieces: list[Piece] = []
    for number, file in enumerate(files):
        parts = list(_cut(file, columns, piece_bytes))
        for span, size in parts:
            last = pieces[-1] if pieces else None
            whole = len(parts) == 1
            if last and last.whole and whole and last.text_bytes + size <= piece_bytes and len(last.spans) < _FILES:
                pieces[-1] = Piece((*last.spans, (number, span)), True, last.text_bytes + size)
            else:
                pieces.append(Piece(((number, span),), whole, size))
    return pieces


def _cut(file: SourceFile, columns: Sequence[str], piece_bytes: int) -> Iterator[tuple[Span, int]]:
    if file.kind == "parquet":
        groups = row_groups(file, columns)
        start, size = 0, 0
        for group, facts in enumerate(groups):
            size += facts.column_bytes
            if size >= piece_bytes or group == len(groups) - 1:
                yield Span(start, group + 1), size
                start, size = group + 1, 0
    elif file.kind in ("jsonl", "lines") and file.compression is None and file.size > piece_bytes:
        for start in range(0, file.size, piece_bytes):
            stop = min(start + piece_bytes, file.size)
            yield Span(start, stop), stop - start
    elif file.kind in ("tokens", "document") or file.size:
        yield Span(), file.size if file.kind == "tokens" else text_bytes(file, columns)
