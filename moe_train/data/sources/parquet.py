"""Parquet files, a bounded number of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moe_train.data.sources.rows import BATCH_BYTES, ROWS_PER_BATCH, Rows, SourceFile, Span

DAMAGED = "damaged page"


@dataclass(frozen=True)
class RowGroup:
    rows: int
    column_bytes: int
    """Of the columns that were asked for, uncompressed."""


def read_parquet(file: SourceFile, columns: Sequence[str], span: Span, skip_damaged: bool) -> Iterator[Rows]:
    """Rows of the row groups of ``span``; only these columns are read, and those that the file has.

    ``skip_damaged``: rows from a damaged page to the end of its row group are bad, not an error.
    Errors: ValueError naming the file and the row; OSError where its bytes cannot be read.
    """
    with _open(file) as parquet:
        have = set(parquet.schema_arrow.names)
        wanted = [name for name in columns if name in have]
        row = 0
        stop = parquet.num_row_groups if span.stop is None else span.stop
        for groups in _together(parquet, range(span.start, stop)):
            try:
                together = list(_batches(parquet, groups, wanted)) if len(groups) > 1 else []
            except _errors():
                together = []  # one by one, to see where
            for batch in together:
                yield _rows(row, batch)
                row += batch.num_rows
            for group in groups if not together else []:
                end = row + parquet.metadata.row_group(group).num_rows
                try:
                    for batch in _batches(parquet, [group], wanted):
                        yield _rows(row, batch)
                        row += batch.num_rows
                except _errors() as error:
                    if not skip_damaged:
                        before = sum(parquet.metadata.row_group(i).num_rows for i in range(span.start))
                        raise ValueError(
                            f"{file.path} cannot be read as parquet behind row {before + row} ({error}); "
                            "--on-bad skip leaves out the rest of such a row group"
                        ) from error
                    _check_damage(file, group, wanted, error)
                    lost = end - row
                    yield Rows(row, lost, {name: [None] * lost for name in wanted}, dict.fromkeys(range(lost), DAMAGED))
                row = end


def row_groups(file: SourceFile, columns: Sequence[str]) -> list[RowGroup]:
    """What the file says about its row groups; a column that is missing has no bytes."""
    with _open(file) as parquet:
        meta = parquet.metadata
        places = [i for i in range(meta.num_columns) if meta.schema.column(i).path.split(".")[0] in columns]
        groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
        return [RowGroup(g.num_rows, sum(g.column(i).total_uncompressed_size for i in places)) for g in groups]


def parquet_columns(file: SourceFile) -> list[str]:
    """The columns of a file. ValueError where it is not parquet."""
    with _open(file) as parquet:
        return list(parquet.schema_arrow.names)


def _together(parquet: Any, groups: range) -> Iterator[list[int]]:
    """Neighbours that are small, as FineWeb's, together: a call of the reader, and one of an engine, cost 1 ms each."""
    together: list[int] = []
    room = BATCH_BYTES
    for group in groups:
        size = parquet.metadata.row_group(group).total_byte_size
        if together and size > room:
            yield together
            together, room = [], BATCH_BYTES
        together.append(group)
        room -= size
    if together:
        yield together


def _batches(parquet: Any, groups: list[int], columns: list[str]) -> Iterator[Any]:
    facts = [parquet.metadata.row_group(group) for group in groups]
    per_row = max(1, sum(one.total_byte_size for one in facts) // max(1, sum(one.num_rows for one in facts)))
    size = max(1, min(ROWS_PER_BATCH, BATCH_BYTES // per_row))
    return iter(parquet.iter_batches(size, row_groups=groups, columns=columns, use_threads=False))


def _rows(first: int, batch: Any) -> Rows:
    return Rows(first, batch.num_rows, dict(zip(batch.schema.names, batch.columns, strict=True)))


def _check_damage(file: SourceFile, group: int, columns: list[str], error: Exception) -> None:
    """OSError where a disk or a network is to blame: nothing is known to be damaged then, and no row is to be lost."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    with file.open() as stream, _open(file) as parquet:
        facts = parquet.metadata.row_group(group)
        for number in range(facts.num_columns):
            column = facts.column(number)
            stream.seek(column.dictionary_page_offset or column.data_page_offset)
            if len(stream.read(column.total_compressed_size)) < column.total_compressed_size:
                raise OSError(f"{file.path} ends inside row group {group}") from error
        try:
            for _ in _batches(parquet, [group], columns):
                pass
        except _errors():
            return
    raise OSError(f"row group {group} of {file.path} could be read the second time only; run again") from error


class _open:
    """The file as pyarrow reads it. ValueError where it is not parquet."""

    def __init__(self, file: SourceFile) -> None:
        self.file = file

    def __enter__(self) -> Any:
        import pyarrow.parquet as pq

        try:
            self._stream = None if self.file.is_local else self.file.open()
            self._parquet = pq.ParquetFile(self._stream or self.file.path, page_checksum_verification=True)
        except _errors() as error:
            raise ValueError(f"{self.file.path} is not a parquet file, or it is damaged: {error}") from error
        return self._parquet

    def __exit__(self, *_: object) -> None:
        self._parquet.close()
        if self._stream is not None:
            self._stream.close()


def _errors() -> tuple[type[Exception], ...]:
    import pyarrow as pa

    return (pa.ArrowException, OSError)
