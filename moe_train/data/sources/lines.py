"""JSONL and plain text, compressed or not, as a stream."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from moe_train.data.sources.rows import BATCH_BYTES, INVALID_UTF8, ROWS_PER_BATCH, Rows, SourceFile, Span

TEXT = "text"
"""The column that plain text has."""


def open_text(file: SourceFile) -> BinaryIO:
    """The file's bytes, decompressed by the ending of its name."""
    import pyarrow as pa

    stream = file.open()
    if file.compression is None:
        return stream
    return io.BufferedReader(pa.CompressedInputStream(stream, file.compression), 1 << 20)  # type: ignore[type-var]


def read_jsonl(file: SourceFile, columns: Sequence[str], span: Span) -> Iterator[Rows]:
    """A JSON object per line; a key that an object lacks is None there."""
    for first_row, lines in _batches(file, span):
        bad: dict[int, str] = {}
        objects: list[dict[str, Any]] = []
        for place, line in enumerate(lines):
            found: Any = {}
            try:
                # Some programs begin a file with a mark of its encoding.
                coding = "utf-8-sig" if first_row + place == 0 else "utf-8"
                found = json.loads(line.decode(coding)) if line.strip() else {}
            except UnicodeDecodeError:
                bad[place] = INVALID_UTF8
            except (ValueError, RecursionError):
                bad[place] = "bad JSON"
            if not isinstance(found, dict):
                bad[place] = "no JSON object"
                found = {}
            objects.append(found)
        values = {name: [_text(one.get(name), place, bad) for place, one in enumerate(objects)] for name in columns}
        yield Rows(first_row, len(lines), values, bad)


def _text(value: Any, place: int, bad: dict[int, str]) -> Any:
    """JSON may spell half of a surrogate pair, which is no character and has no UTF-8."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            bad[place] = INVALID_UTF8
            return None
    return value


def read_lines(file: SourceFile, span: Span) -> Iterator[Rows]:
    """A document per line, without the end of the line."""
    for first_row, lines in _batches(file, span):
        yield _decoded(first_row, [line.rstrip(b"\r\n") for line in lines])


def read_document(file: SourceFile) -> Iterator[Rows]:
    """The whole file as one document."""
    with _errors_named(file, 0), open_text(file) as stream:
        content = stream.read()
    yield _decoded(0, [content])


def lines_before(file: SourceFile, position: int) -> int:
    """Number of lines that begin before a place in an uncompressed file."""
    count, left, last = 0, position, b"\n"
    with file.open() as stream:
        while left and (content := stream.read(min(left, 1 << 20))):
            count += content.count(b"\n")
            left -= len(content)
            last = content[-1:]
    return count + (last != b"\n")


def _decoded(first_row: int, contents: list[bytes]) -> Rows:
    texts: list[str | None] = []
    bad = {}
    for place, content in enumerate(contents):
        try:
            texts.append(content.decode("utf-8"))
        except UnicodeDecodeError:
            texts.append(None)
            bad[place] = INVALID_UTF8
    return Rows(first_row, len(texts), {TEXT: texts}, bad)


def _batches(file: SourceFile, span: Span) -> Iterator[tuple[int, list[bytes]]]:
    """(number of the first line, lines) of the lines that begin in the span, bounded in number and, but for single
    long lines, in bytes."""
    row = 0
    lines: list[bytes] = []
    size = 0
    with _errors_named(file, row), open_text(file) as stream:
        place = 0
        if span.start:
            # The line that the byte before belongs to is another span's.
            stream.seek(span.start - 1)
            place = span.start - 1 + len(stream.readline())
        while True:
            with _errors_named(file, row + len(lines)):
                line = stream.readline() if span.stop is None or place < span.stop else b""
            if line:
                lines.append(line)
                size += len(line)
                place += len(line)
            if lines and (not line or len(lines) >= ROWS_PER_BATCH or size >= BATCH_BYTES):
                yield row, lines
                row += len(lines)
                lines, size = [], 0
            if not line:
                return


class _errors_named:
    """Turns what the operating system or a decompressor raises into a ValueError that names file and line."""

    def __init__(self, file: SourceFile, row: int) -> None:
        self.file, self.row = file, row

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import pyarrow as pa

        if isinstance(error, (OSError, EOFError, pa.ArrowException)):
            raise ValueError(f"{self.file.path} cannot be read behind line {self.row}: {error}") from error
