"""The result of one piece: a file of tokens per split, a table of documents and, when both are there, a file of facts.

Suffixes: D documents.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from moe_train.data.files import PARTIAL_SUFFIX, process_name, write_atomically, xxh3_of

_COUNTS = ("documents", "tokens", "text_bytes")
_TABLE_ROWS = 1 << 16
_RUNS = os.sysconf("SC_IOV_MAX")
"""Most pieces of memory that one call may write."""
TOKENS, LOSS = "bin", "loss"
"""Streams of a part: token ids, and whether each counts in the loss (instruction data)."""
CHECKSUM = "xxh3_128"
"""Which one is noted of sources."""


@dataclass
class PartFacts:
    rows: dict[str, int] = field(default_factory=dict)
    """Source (its place in the list, as JSON has keys) -> rows that were read of it, used or not."""
    checksums: dict[str, str] = field(default_factory=dict)
    """Of the sources that are whole in the piece."""
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    by_split: list[dict[str, int]] = field(default_factory=list)
    """documents, tokens and text_bytes of each split."""
    domains: list[dict[str, dict[str, int]]] = field(default_factory=list)
    """Of each split: label -> documents, tokens, text_bytes."""
    skipped: dict[str, int] = field(default_factory=dict)
    problems: list[dict[str, Any]] = field(default_factory=list)
    """The first rows that were left out for what they hold: file, first row (from the piece's first of that file),
    number of rows, reason."""
    written: dict[str, str] = field(default_factory=dict)
    """Name of each file of the part -> its XXH3 of 128 bits."""
    error: str | None = None
    """Why the piece cannot be done at all."""


@dataclass(frozen=True)
class Part:
    """Where the result of a piece lies. ``cut`` is the one that ends where a limit says."""

    folder: Path
    number: int
    cut: bool = False

    @property
    def _stem(self) -> Path:
        return self.folder / f"{self.number:06d}{'.cut' if self.cut else ''}"

    @property
    def facts_path(self) -> Path:
        return Path(f"{self._stem}.json")

    @property
    def table_path(self) -> Path:
        return Path(f"{self._stem}.arrow")

    def stream_path(self, split: int, stream: str = TOKENS) -> Path:
        return Path(f"{self._stem}.{split}.{stream}")

    def facts(self) -> PartFacts | None:
        """None where the piece is not done."""
        try:
            return PartFacts(**json.loads(self.facts_path.read_text()))
        except FileNotFoundError:
            return None

    def discard_if_torn(self) -> None:
        """Makes a part not done whose files are not what its facts say: they are not on the disk for certain before the
        machine is ended, as that would cost as much again as to write them once."""
        facts = self.facts()
        if facts is not None and not all(_is(self.folder / name, digest) for name, digest in facts.written.items()):
            self.facts_path.unlink()

    def table(self, columns: Sequence[str]) -> Any:
        """Columns split (place of the split), length (tokens), file (place of the source), row (from the piece's first
        of that file), id, domain."""
        import pyarrow as pa

        with pa.memory_map(str(self.table_path)) as stream:
            return pa.ipc.open_file(stream).read_all().select(list(columns))


class PartWriter:
    """Takes documents in source order; `finish` makes the part appear under its names, the facts last.

    Temporary names hold the process, so that two that do the same work do not meet. Memory holds the table of some ten
    thousand documents.
    """

    def __init__(self, part: Part, splits: int, streams: Sequence[str]) -> None:
        import pyarrow as pa

        self.part, self.facts = part, PartFacts()
        paths = [part.stream_path(split, stream) for split in range(splits) for stream in streams]
        self._files = {path: open(self._temporary(path), "wb", buffering=0) for path in paths}
        self._digests = {path: xxhash.xxh3_128() for path in paths}
        self._splits = splits
        self._schema = pa.schema(
            [("split", pa.int8()), ("length", pa.int32()), ("file", pa.int32()), ("row", pa.int64())]
            + [("id", pa.large_string()), ("domain", pa.large_string())]
        )
        self._table = pa.ipc.new_file(str(self._temporary(part.table_path)), self._schema)
        self._waiting: list[Any] = []
        self._finished = False
        self.facts.by_split = [dict.fromkeys(_COUNTS, 0) for _ in range(splits)]
        self.facts.domains = [{} for _ in range(splits)]

    def add(
        self,
        file: int,
        streams: Mapping[str, npt.NDArray[Any]],
        lengths_D: npt.NDArray[np.int64],
        splits_D: npt.NDArray[np.int8],
        sizes_D: npt.NDArray[np.int64],
        rows_D: npt.NDArray[np.int64],
        ids_D: Any,
        domains_D: Any,
    ) -> None:
        """Appends documents of a source: their values in each stream one after the other, tokens, split, bytes of text,
        row, and arrow arrays of names and labels."""
        import pyarrow as pa

        ends_D = np.cumsum(lengths_D)
        for split in range(self._splits):
            own_D = splits_D == split
            for stream, values in streams.items():
                path = self.part.stream_path(split, stream)
                _write(self._files[path], self._digests[path], values, ends_D, own_D)
        files_D = np.full(len(rows_D), file, np.int32)
        columns = [pa.array(splits_D), pa.array(lengths_D, pa.int32()), pa.array(files_D), pa.array(rows_D)]
        table = pa.table([*columns, ids_D, domains_D], schema=self._schema)
        self._waiting.append(table.append_column("size", pa.array(sizes_D)))
        if sum(map(len, self._waiting)) >= _TABLE_ROWS:
            self._flush()

    def finish(self) -> PartFacts:
        self._flush()
        self._table.close()
        for path, stream in self._files.items():
            stream.close()
            os.replace(self._temporary(path), path)
            self.facts.written[path.name] = self._digests[path].hexdigest()
        os.replace(self._temporary(self.part.table_path), self.part.table_path)
        self.facts.written[self.part.table_path.name] = _digest_of(self.part.table_path)
        write_atomically(self.part.facts_path, json.dumps(asdict(self.facts)).encode())
        self._finished = True
        return self.facts

    def close(self) -> None:
        """Removes what is left of a part that was not finished."""
        if self._finished:
            return
        with contextlib.suppress(OSError):  # a full disk does not take the table's end
            self._table.close()
        for path, stream in self._files.items():
            stream.close()
            self._temporary(path).unlink(missing_ok=True)
        self._temporary(self.part.table_path).unlink(missing_ok=True)

    def _temporary(self, path: Path) -> Path:
        return path.with_name(f"{path.name}.{process_name()}{PARTIAL_SUFFIX}")

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting)
        self._waiting = []
        self._table.write_table(table.select(self._schema.names))
        sums = [("length", "count"), ("length", "sum"), ("size", "sum")]
        for one in table.group_by(["split", "domain"]).aggregate(sums).to_pylist():
            split, label = one["split"], one["domain"]
            labelled = self.facts.domains[split].setdefault(label, dict.fromkeys(_COUNTS, 0))
            for name, key in zip(_COUNTS, ("length_count", "length_sum", "size_sum"), strict=True):
                labelled[name] += one[key]
                self.facts.by_split[split][name] += one[key]
                setattr(self.facts, name, getattr(self.facts, name) + one[key])


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and _digest_of(path) == digest


def _digest_of(path: Path) -> str:
    with open(path, "rb") as stream:
        return xxh3_of(stream)


def _write(
    stream: Any, digest: Any, values: npt.NDArray[Any], ends_D: npt.NDArray[np.int64], own_D: npt.NDArray[np.bool_]
) -> None:
    """Appends the values of some documents, run by run of neighbours and without a copy of them."""
    changes = np.flatnonzero(np.diff(own_D, prepend=False, append=False))
    places = (np.concatenate([[0], ends_D])[changes] * values.itemsize).reshape(-1, 2).tolist()
    letters = np.ascontiguousarray(values).data.cast("B")
    runs = [letters[begin:end] for begin, end in places]
    for first in range(0, len(runs), _RUNS):
        some = runs[first : first + _RUNS]
        written = os.writev(stream.fileno(), some)
        # One call may write less.
        left = memoryview(b"".join(some))[written:] if written < sum(map(len, some)) else b""
        for run in some:
            digest.update(run)
        while left:
            left = left[stream.write(left) :]
