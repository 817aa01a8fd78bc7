"""Parquet files, a bounded number of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from moe_train.data.sources.rows import INVALID_UTF8, ROWS_PER_BATCH, Rows, SourceFile


def read_parquet(file: SourceFile, columns: Sequence[str]) -> Iterator[Rows]:
    """Rows in order; only these columns are read. ValueError naming the file, where it is damaged or lacks a column."""
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
                for batch in parquet.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=list(columns)):
                    yield _rows(row, batch)
                    row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file.path} cannot be read as parquet behind row {row}: {error}") from error


def _rows(first_row: int, batch: Any) -> Rows:
    try:
        return Rows(first_row, batch.to_pydict())
    except UnicodeDecodeError:
        pass
    # Some row is not UTF-8: value by value, in columns of text.
    values: dict[str, list[Any]] = {}
    bad: dict[int, str] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        values[name] = []
        for place in range(batch.num_rows):
            try:
                values[name].append(column[place].as_py())
            except UnicodeDecodeError:
                values[name].append(None)
                bad[place] = INVALID_UTF8
    return Rows(first_row, values, bad)


def parquet_columns(file: SourceFile) -> list[str]:
    """The columns of a file. ValueError where it is not parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(file.path).names)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file.path} is not a parquet file, or it is damaged: {error}") from error


def text_bytes(file: SourceFile, column: str) -> int:
    """About how many bytes of text a column holds, by the file's own account."""
    import pyarrow.parquet as pq

    meta = pq.read_metadata(file.path)
    chunks = [meta.row_group(i).column(j) for i in range(meta.num_row_groups) for j in range(meta.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
