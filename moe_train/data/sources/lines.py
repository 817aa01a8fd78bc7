"""JSONL and plain text, compressed or not, as a stream."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from moe_train.data.sources.rows import INVALID_UTF8, ROWS_PER_BATCH, Rows, SourceFile

_BATCH_BYTES = 4 << 20
TEXT = "text"
"""The column that plain text has."""


def open_bytes(file: SourceFile) -> BinaryIO:
    """The file's bytes, decompressed by the ending of its name."""
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(file.path), compression="detect"), 1 << 20)  # type: ignore[arg-type]


def read_jsonl(file: SourceFile, columns: Sequence[str]) -> Iterator[Rows]:
    """A JSON object per line; a key that an object lacks is None there."""
    for first_row, lines in _batches(file):
        bad: dict[int, str] = {}
        objects: list[dict[str, Any]] = []
        for place, line in enumerate(lines):
            found: Any = {}
            try:
                found = json.loads(line.decode("utf-8")) if line.strip() else {}
            except UnicodeDecodeError:
                bad[place] = INVALID_UTF8
            except ValueError:
                bad[place] = "bad JSON"
            if not isinstance(found, dict):
                bad[place] = "no JSON object"
                found = {}
            objects.append(found)
        yield Rows(first_row, {name: [one.get(name) for one in objects] for name in columns}, bad)


def read_lines(file: SourceFile) -> Iterator[Rows]:
    """A document per line, without the end of the line."""
    for first_row, lines in _batches(file):
        yield _decoded(first_row, [line.rstrip(b"\r\n") for line in lines])


def read_document(file: SourceFile) -> Iterator[Rows]:
    """The whole file as one document."""
    with _errors_named(file, 0), open_bytes(file) as stream:
        content = stream.read()
    yield _decoded(0, [content])


def _decoded(first_row: int, contents: list[bytes]) -> Rows:
    texts: list[str | None] = []
    bad = {}
    for place, content in enumerate(contents):
        try:
            texts.append(content.decode("utf-8"))
        except UnicodeDecodeError:
            texts.append(None)
            bad[place] = INVALID_UTF8
    return Rows(first_row, {TEXT: texts}, bad)


def _batches(file: SourceFile) -> Iterator[tuple[int, list[bytes]]]:
    """(number of the first line, lines), bounded in number and, but for single long lines, in bytes."""
    row = 0
    lines: list[bytes] = []
    size = 0
    with _errors_named(file, row), open_bytes(file) as stream:
        while True:
            with _errors_named(file, row + len(lines)):
                line = stream.readline()
            if line:
                lines.append(line)
                size += len(line)
            if lines and (not line or len(lines) >= ROWS_PER_BATCH or size >= _BATCH_BYTES):
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
