"""Parquet files as a stream of record batches, a bounded number of rows at a time."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROWS_PER_BATCH = 512


@dataclass(frozen=True)
class SourceFile:
    name: str
    """Path below the folder that all sources have in common, with forward slashes: what provenance records."""
    path: Path

    @property
    def size(self) -> int:
        return self.path.stat().st_size


def find_sources(sources: Sequence[str | Path]) -> list[SourceFile]:
    """The parquet files that files, folders (searched to their bottom) and globs stand for, sorted by name, each once.

    Errors: FileNotFoundError for something that does not exist or a folder or glob without a parquet file, ValueError
    for a file of another kind.
    """
    found: set[Path] = set()
    for source in sources:
        path = Path(source)
        if path.is_dir():
            matches = list(path.rglob("*.parquet"))
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(match) for match in glob.glob(str(source), recursive=True)]
        if not matches:
            kind = "holds no .parquet file" if path.is_dir() else "does not exist and matches no file"
            raise FileNotFoundError(f"{source} {kind}")
        for match in matches:
            if match.suffix != ".parquet":
                raise ValueError(f"{match} is not a .parquet file, the only kind of source that is read for now")
        found |= {match.resolve() for match in matches}
    if not found:
        raise ValueError("no source was given")
    root = os.path.commonpath([path.parent for path in found])
    files = [SourceFile(path.relative_to(root).as_posix(), path) for path in found]
    return sorted(files, key=lambda file: file.name)


def read_rows(file: SourceFile, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """(number of the first row, values by column) for consecutive rows, in order; only these columns are read.

    Errors: ValueError naming the file, where it is damaged or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(file.path) as parquet:
            missing = [name for name in columns if name not in parquet.schema_arrow.names]
            if missing:
                have = ", ".join(parquet.schema_arrow.names)
                raise ValueError(f"{file.path} has no column {', '.join(missing)}; it has {have}")
            for group in range(parquet.num_row_groups):
                for batch in parquet.iter_batches(_ROWS_PER_BATCH, row_groups=[group], columns=list(columns)):
                    yield row, batch.to_pydict()
                    row += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.path} cannot be read as parquet behind row {row}: {error}") from error


def first_texts(files: Sequence[SourceFile], column: str, count: int) -> list[str]:
    """Up to ``count`` texts from the beginnings of files that are spread evenly over all of them."""
    chosen = files[:: max(1, len(files) // 16)]
    share = -(-count // max(1, len(chosen)))
    texts: list[str] = []
    for file in chosen:
        _, values = next(read_rows(file, [column]), (0, {column: []}))
        texts += [text for text in values[column] if text][:share]
    return texts


def column_names(file: SourceFile) -> list[str]:
    """The columns of a file. ValueError where it is not parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(file.path).names)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file.path} is not a parquet file, or it is damaged: {error}") from error


def sample_texts(files: Sequence[SourceFile], column: str, max_bytes: int) -> Iterator[str]:
    """Texts spread evenly over the files, about `max_bytes` of UTF-8 in all; nulls are passed over. Deterministic."""
    import pyarrow.parquet as pq

    total = 0
    for file in files:
        if column not in column_names(file):
            raise ValueError(f"{file.path} has no column {column}; it has {', '.join(column_names(file))}")
        meta = pq.read_metadata(file.path)
        chunks = [meta.row_group(i).column(j) for i in range(meta.num_row_groups) for j in range(meta.num_columns)]
        total += sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
    share = min(1.0, max_bytes / max(total, 1))
    due, number = 0.0, 0
    for file in files:
        for _, values in read_rows(file, [column]):
            for text in values[column]:
                # Row n is taken where n * share passes an integer.
                number += 1
                if number * share >= due + 1:
                    due += 1
                    if text is not None:
                        yield text
