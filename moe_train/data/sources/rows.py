"""What every kind of source is read as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["parquet", "jsonl", "lines", "document", "tokens"]
ROWS_PER_BATCH = 1024
BATCH_BYTES = 8 << 20
"""About so much is read at a time, but for a single row that is larger."""
INVALID_UTF8 = "invalid UTF-8"
NO_TEXT = "no text"


@dataclass(frozen=True)
class SourceFile:
    name: str
    """Path below the folder that all sources have in common, with forward slashes: what provenance records."""
    path: str
    """Where it is: a local path, or a URL that fsspec opens."""
    kind: Kind
    size: int
    """In bytes."""
    version: str
    """Changes when the content does: the time of the last change, or what the store says (ETag)."""

    @property
    def is_local(self) -> bool:
        return "://" not in self.path

    @property
    def compression(self) -> str | None:
        return {".gz": "gzip", ".zst": "zstd"}.get(Path(self.path).suffix)

    def open(self) -> BinaryIO:
        """The bytes as they are stored. OSError where they cannot be read."""
        if self.is_local:
            return open(self.path, "rb")
        import fsspec

        stream: BinaryIO = fsspec.open(self.path, "rb").open()
        return stream


@dataclass(frozen=True)
class Span:
    """A part of a file: row groups of parquet, bytes of lines (those that begin there), or all of it (the default)."""

    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a file: rows of parquet, lines of JSONL or text, or the one document of a text file."""

    first_row: int
    """Number of the first one in what is read of the file, from 0."""
    count: int
    values: dict[str, Any]
    """Column -> an arrow array or a list, with a value per row; None where there is none. A column that the file does
    not have is not here."""
    bad: dict[int, str] = field(default_factory=dict)
    """Place in this batch -> why the row cannot be read; its values are None."""
    _labels: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def first(self, count: int) -> Rows:
        """The first so many of these rows."""
        bad = {place: reason for place, reason in self.bad.items() if place < count}
        return Rows(self.first_row, count, {name: column[:count] for name, column in self.values.items()}, bad)

    def texts(self, name: str) -> tuple[Any, dict[int, str]]:
        """A column as an arrow large_string array, null where it is no text, and {place: reason} of those."""
        import pyarrow as pa

        column = self.values[name]
        if isinstance(column, list):
            bad = {place: NO_TEXT for place, value in enumerate(column) if not isinstance(value, str | None)}
            kept = [None if place in bad else value for place, value in enumerate(column)] if bad else column
            return pa.array(kept, pa.large_string()), bad
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            column = column.cast(pa.large_binary()) if pa.types.is_binary(column.type) else _as_strings(column)
            column = column.view(pa.large_string()) if pa.types.is_large_binary(column.type) else column
        column = column.cast(pa.large_string())
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            values, bad = _readable(column)
            return pa.array(values, pa.large_string()), bad
        return column, {}

    def labels(self, name: str) -> Any:
        """A column as an arrow large_string array, whatever it holds; all null where the file has no such column."""
        if name not in self._labels:
            self._labels[name] = self._spelled(name)
        return self._labels[name]

    def _spelled(self, name: str) -> Any:
        import pyarrow as pa

        column = self.values.get(name)
        if column is None:
            return pa.nulls(self.count, pa.large_string())
        if isinstance(column, list):
            return pa.array([None if value is None else str(value) for value in column], pa.large_string())
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            return self.texts(name)[0]
        return _as_strings(column)

    def numbers(self, name: str) -> npt.NDArray[np.float64]:
        """A column as numbers; not a number (nan) where there is none."""
        import pyarrow as pa

        column = self.values.get(name)
        if column is None:
            return np.full(self.count, np.nan)
        if not isinstance(column, list) and (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
            numbers: npt.NDArray[np.float64] = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
            return numbers
        values: Sequence[Any] = column if isinstance(column, list) else column.to_pylist()
        return np.array([value if isinstance(value, int | float) else np.nan for value in values], np.float64)

    def objects(self, name: str) -> list[Any]:
        """A column as Python objects. UnicodeDecodeError where some text is not UTF-8."""
        column = self.values.get(name)
        if column is None:
            return [None] * self.count
        return column if isinstance(column, list) else list(column.to_pylist())

    def readable(self, name: str) -> tuple[list[Any], dict[int, str]]:
        """A column as Python objects, None where some text in it is not UTF-8, and {place: reason} of those."""
        try:
            return self.objects(name), {}
        except UnicodeDecodeError:
            return _readable(self.values[name])


def _as_strings(column: Any) -> Any:
    """Dictionaries, numbers, dates, … by their spelling. ValueError for what has none, as lists."""
    import pyarrow as pa

    try:
        return column.cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"a column of type {column.type} does not hold text") from error


def _readable(column: Any) -> tuple[list[Any], dict[int, str]]:
    """None in place of what is not UTF-8."""
    values: list[Any] = []
    bad = {}
    for place in range(len(column)):
        try:
            values.append(column[place].as_py())
        except UnicodeDecodeError:
            values.append(None)
            bad[place] = INVALID_UTF8
    return values, bad
