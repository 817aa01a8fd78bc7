"""The result of one piece: values in files per split, a table of documents and, when both are there, a file of facts.

Suffixes: D documents.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_train.data.files import PARTIAL_SUFFIX, process_name, write_atomically, xxh3_of, xxh3_of_range
from moe_train.data.prepare.copying import FileRange
from moe_train.data.prepare.runs import Runs, Segment, stream_key

_COUNTS = ("documents", "tokens", "text_bytes")
_TABLE_ROWS = 1 << 16
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
    segments: dict[str, list[Segment]] = field(default_factory=dict)
    """Of each split and stream, by `stream_key`: where the values are, in order."""
    table: str = ""
    """XXH3 of the table of documents."""
    error: str | None = None
    """Why the piece cannot be done at all."""


@dataclass(frozen=True)
class Part:
    """Where the result of a piece lies. ``cut`` is the one that ends where a limit says."""

    folder: Path
    number: int
    cut: bool = False

    @property
    def stem(self) -> Path:
        return self.folder / f"{self.number:06d}{'.cut' if self.cut else ''}"

    @property
    def facts_path(self) -> Path:
        return Path(f"{self.stem}.json")

    @property
    def table_path(self) -> Path:
        return Path(f"{self.stem}.arrow")

    def facts(self) -> PartFacts | None:
        """None where the piece is not done."""
        try:
            facts = PartFacts(**json.loads(self.facts_path.read_text()))
        except FileNotFoundError:
            return None
        facts.segments = {key: [Segment(**one) for one in some] for key, some in facts.segments.items()}  # type: ignore
        return facts

    def discard_if_torn(self) -> None:
        """Makes a part not done whose files are not what its facts say: they are not on the disk for certain before the
        machine is ended, as that would cost as much again as to write them once."""
        facts = self.facts()
        if facts is not None and not self._is_whole(facts):
            self.facts_path.unlink()

    def ranges(self, facts: PartFacts, split: int, stream: str, start: int, count: int) -> Iterator[FileRange]:
        """So many bytes of a split's values, from this one on."""
        for segment in facts.segments.get(stream_key(split, stream), []):
            own = min(count, segment.count - start)
            if own > 0:
                yield self.folder / segment.file, segment.start + start, own
                count -= own
            start = max(0, start - segment.count)
        assert not count, (self.facts_path, split, stream, count)

    def table(self, columns: Sequence[str]) -> Any:
        """Columns split (place of the split), length (tokens), file (place of the source), row (from the piece's first
        of that file), id, domain."""
        import pyarrow as pa

        with pa.memory_map(str(self.table_path)) as stream:
            return pa.ipc.open_file(stream).read_all().select(list(columns))

    def _is_whole(self, facts: PartFacts) -> bool:
        segments = [one for some in facts.segments.values() for one in some]
        try:
            return _digest_of(self.table_path) == facts.table and all(
                xxh3_of_range(self.folder / one.file, one.start, one.count) == one.xxh3_128 for one in segments
            )
        except FileNotFoundError:
            return False


class PartWriter:
    """Takes documents in source order; `finish` makes the part appear under its names, the facts last.

    Temporary names hold the process, so that two that do the same work do not meet. Memory holds the table of some ten
    thousand documents.
    """

    def __init__(self, part: Part, splits: int, runs: Runs) -> None:
        import pyarrow as pa

        self.part, self.facts = part, PartFacts()
        self._runs, self._splits = runs, splits
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
            self._runs.write(self.part.stem.name, split, streams, ends_D, splits_D == split)
        files_D = np.full(len(rows_D), file, np.int32)
        columns = [pa.array(splits_D), pa.array(lengths_D, pa.int32()), pa.array(files_D), pa.array(rows_D)]
        table = pa.table([*columns, ids_D, domains_D], schema=self._schema)
        self._waiting.append(table.append_column("size", pa.array(sizes_D)))
        if sum(map(len, self._waiting)) >= _TABLE_ROWS:
            self._flush()

    def finish(self) -> PartFacts:
        self._flush()
        self._table.close()
        os.replace(self._temporary(self.part.table_path), self.part.table_path)
        self.facts.table = _digest_of(self.part.table_path)
        self.facts.segments = self._runs.segments()
        write_atomically(self.part.facts_path, json.dumps(asdict(self.facts)).encode())
        self._runs.keep_part()
        self._finished = True
        return self.facts

    def close(self) -> None:
        """Removes what is left of a part that was not finished."""
        if self._finished:
            return
        with contextlib.suppress(OSError):  # a full disk does not take the table's end
            self._table.close()
        self._runs.discard_part()
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


def _digest_of(path: Path) -> str:
    with open(path, "rb") as stream:
        return xxh3_of(stream)
