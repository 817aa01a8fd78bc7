"""What every kind of source is read as."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["parquet", "jsonl", "lines", "document", "tokens"]
ROWS_PER_BATCH = 1024
BATCH_BYTES = 12 << 20
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

    def check_unchanged(self) -> None:
        """ValueError where the file is not what it was when it was found."""
        size, version = file_version(self.path)
        if (size, version) != (self.size, self.version):
            raise ValueError(f"{self.path} changed while it was read; when it is complete, begin again")

    def open(self) -> BinaryIO:
        """The bytes as they are stored. OSError where they cannot be read."""
        if self.is_local:
            return open(self.path, "rb")
        import fsspec

        stream: BinaryIO = fsspec.open(self.path, "rb").open()
        return stream


def file_version(path: str) -> tuple[int, str]:
    """Bytes of a file, and what changes when its content does. OSError where it is gone."""
    if "://" not in path:
        facts = os.stat(path)
        return facts.st_size, str(facts.st_mtime_ns)
    import fsspec

    system, place = fsspec.core.url_to_fs(path)
    system.invalidate_cache()
    return version_of(system.info(place))


def version_of(info: dict[str, Any]) -> tuple[int, str]:
    """The same from what a store says about a file."""
    for key in ("ETag", "etag", "checksum", "blob_id", "mtime", "LastModified", "last_modified", "created"):
        if info.get(key) is not None:
            return int(info["size"]), str(info[key])
    return int(info["size"]), ""


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
        """A column as an arrow large_string array, null where it is no text, and {place: reason} of those.

        Errors: ValueError where the column holds something else than text.
        """
        import pyarrow as pa

        column = self.values[name]
        if isinstance(column, list):
            bad = {place: NO_TEXT for place, value in enumerate(column) if not isinstance(value, str | None)}
            kept = [None if place in bad else value for place, value in enumerate(column)] if bad else column
            return pa.array(kept, pa.large_string()), bad
        letters = as_letters(column)
        if letters is None:
            raise ValueError(f"column {name} holds {column.type}, not text")
        try:
            letters.validate(full=True)
        except pa.ArrowInvalid:
            values, bad = _readable(letters)
            return pa.array(values, pa.large_string()), bad
        return letters, {}

    def labels(self, name: str) -> Any:
        """A column as an arrow large_string array, numbers and dates by their spelling; all null where the file has no
        such column. ValueError for a column of lists or objects."""
        if name not in self._labels:
            self._labels[name] = self._spelled(name)
        return self._labels[name]

    def names(self, name: str) -> Any:
        """The same for what is only noted: null where it cannot be spelled."""
        import pyarrow as pa

        try:
            return self.labels(name)
        except ValueError:
            return pa.nulls(self.count, pa.large_string())

    def _spelled(self, name: str) -> Any:
        import pyarrow as pa

        column = self.values.get(name)
        if column is None:
            return pa.nulls(self.count, pa.large_string())
        if isinstance(column, list):
            return pa.array([None if value is None else str(value) for value in column], pa.large_string())
        if as_letters(column) is not None:
            return self.texts(name)[0]
        try:
            return column.cast(pa.large_string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(f"column {name} holds {column.type}, which has no spelling") from error

    def numbers(self, name: str) -> npt.NDArray[np.float64]:
        """A column as numbers, also those that are spelled; not a number (nan) where there is none."""
        import pyarrow as pa

        column = self.values.get(name)
        if column is None:
            return np.full(self.count, np.nan)
        if not isinstance(column, list) and (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
            numbers: npt.NDArray[np.float64] = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
            return numbers
        values: Sequence[Any] = column if isinstance(column, list) else column.to_pylist()
        return np.array([_number(value) for value in values], np.float64)

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


def as_letters(column: Any) -> Any:
    """An arrow array of text, or of bytes that may be text, as large_string without looking at it; None for others."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        return as_letters(column.dictionary_decode())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return column.cast(pa.large_string())
    if str(kind) == "string_view":
        return column.cast(pa.large_string())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or str(kind) == "binary_view":
        return column.cast(pa.large_binary()).view(pa.large_string())
    return None


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


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
