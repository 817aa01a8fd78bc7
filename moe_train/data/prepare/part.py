"""The result of one piece: a file of tokens per split, a table of documents and, when both are whole, a file of facts.

Suffixes: D documents.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_train.data.files import sync

TOKENS, LOSS = "bin", "loss"
"""Streams of a part: token ids, and whether each counts in the loss (instruction data)."""


@dataclass
class PartFacts:
    rows: int = 0
    """Rows that were read, used or not."""
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    by_split: list[dict[str, int]] = field(default_factory=list)
    """documents, tokens and text_bytes of each split."""
    domains: list[dict[str, dict[str, int]]] = field(default_factory=list)
    """Of each split: label -> documents, tokens, text_bytes."""
    skipped: dict[str, int] = field(default_factory=dict)
    problems: list[dict[str, Any]] = field(default_factory=list)
    """The first rows that could not be read: first row (from the piece's first), number of rows, reason."""
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

    def table(self, columns: Sequence[str]) -> Any:
        """Columns split (place of the split), length (tokens), row (from the piece's first), id, domain."""
        import pyarrow as pa

        with pa.memory_map(str(self.table_path)) as stream:
            return pa.ipc.open_file(stream).read_all().select(list(columns))


class PartWriter:
    """Takes documents in source order; `finish` makes the part appear under its names, the facts last.

    Temporary names hold the process, so that two that do the same work do not meet.
    """

    def __init__(self, part: Part, splits: int, streams: Sequence[str]) -> None:
        self.part, self.facts = part, PartFacts()
        self._paths = [part.stream_path(split, stream) for split in range(splits) for stream in streams]
        self._files = {path: open(self._temporary(path), "wb", buffering=0) for path in self._paths}
        self._splits = splits
        self._tables: list[Any] = []
        self._sizes: list[npt.NDArray[np.int64]] = []

    def add(
        self,
        streams: Mapping[str, npt.NDArray[Any]],
        lengths_D: npt.NDArray[np.int64],
        splits_D: npt.NDArray[np.int8],
        sizes_D: npt.NDArray[np.int64],
        rows_D: npt.NDArray[np.int64],
        ids_D: Any,
        domains_D: Any,
    ) -> None:
        """Appends documents: their values in each stream one after the other, tokens, split, bytes of text, row, and
        arrow arrays of names and labels."""
        import pyarrow as pa

        ends_D = np.cumsum(lengths_D)
        for split in range(self._splits):
            own_D = splits_D == split
            for stream, values in streams.items():
                _write(self._files[self.part.stream_path(split, stream)], _of_documents(values, ends_D, own_D))
        columns = (pa.array(splits_D), pa.array(lengths_D, pa.int32()), pa.array(rows_D), ids_D, domains_D)
        self._tables.append(pa.table(list(columns), names=["split", "length", "row", "id", "domain"]))
        self._sizes.append(sizes_D)

    def finish(self, skipped: Counter[str]) -> PartFacts:
        import pyarrow as pa

        schema = pa.schema(
            [("split", pa.int8()), ("length", pa.int32()), ("row", pa.int64())]
            + [("id", pa.large_string()), ("domain", pa.large_string())]
        )
        table = pa.concat_tables(self._tables) if self._tables else schema.empty_table()
        temporary = self._temporary(self.part.table_path)
        with pa.ipc.new_file(str(temporary), schema) as stream:
            stream.write_table(table)
        self.facts.skipped = dict(skipped)
        sizes = np.concatenate([*self._sizes, np.zeros(0, np.int64)])
        self._count(table.append_column("size", pa.array(sizes)))
        for path, stream in self._files.items():
            os.fsync(stream.fileno())
            stream.close()
            os.replace(self._temporary(path), path)
        sync(temporary)
        os.replace(temporary, self.part.table_path)
        facts = self._temporary(self.part.facts_path)
        facts.write_text(json.dumps(asdict(self.facts)))
        sync(facts)
        os.replace(facts, self.part.facts_path)
        return self.facts

    def close(self) -> None:
        """Removes what is left of a part that was not finished."""
        for path, stream in self._files.items():
            stream.close()
            self._temporary(path).unlink(missing_ok=True)
        self._temporary(self.part.table_path).unlink(missing_ok=True)

    def _temporary(self, path: Path) -> Path:
        return path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.partial")

    def _count(self, table: Any) -> None:
        groups = table.group_by(["split", "domain"]).aggregate(
            [("length", "sum"), ("length", "count"), ("size", "sum")]
        )
        self.facts.by_split = [dict.fromkeys(("documents", "tokens", "text_bytes"), 0) for _ in range(self._splits)]
        self.facts.domains = [{} for _ in range(self._splits)]
        for one in groups.to_pylist():
            counts = {"documents": one["length_count"], "tokens": one["length_sum"], "text_bytes": one["size_sum"]}
            self.facts.domains[one["split"]][one["domain"]] = counts
            for name, value in counts.items():
                self.facts.by_split[one["split"]][name] += value
                setattr(self.facts, name, getattr(self.facts, name) + value)


def _of_documents(values: npt.NDArray[Any], ends_D: npt.NDArray[np.int64], own_D: npt.NDArray[np.bool_]) -> Any:
    """The values of some documents, copied run by run of neighbours."""
    if own_D.all():
        return values
    changes = np.flatnonzero(np.diff(own_D, prepend=False, append=False))
    starts = np.concatenate([[0], ends_D])[changes]
    return np.concatenate([values[:0], *(values[begin:end] for begin, end in starts.reshape(-1, 2))])


def _write(stream: Any, values: npt.NDArray[Any]) -> None:
    """All of it: one call may write less."""
    left = np.ascontiguousarray(values).data.cast("B")
    while left:
        left = left[stream.write(left) :]
