"""Parquet files, a bounded number of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moe_train.data.sources.rows import BATCH_BYTES, ROWS_PER_BATCH, Rows, SourceFile, Span

DAMAGED = "damaged page"
_ROWS = 4096
"""At most so many at a time, once it is known what they take."""


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
        row, reader = 0, _Reader(parquet, wanted)
        group = span.start
        stop = parquet.num_row_groups if span.stop is None else span.stop
        while group < stop:
            small = reader.neighbours(range(group, stop))
            try:
                together = list(reader.read(small)) if len(small) > 1 else []
            except _errors():
                small, together = small[:1], []  # one by one, to see where
            if together:
                for batch in together:
                    yield _rows(row, batch)
                    row += batch.num_rows
                group += len(small)
                continue
            end = row + parquet.metadata.row_group(group).num_rows
            try:
                for batch in reader.read([group]):
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
            row, group = end, group + 1


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


class _Reader:
    """Reads about BATCH_BYTES at a time, by what rows took so far: the file counts a repeated text once."""

    def __init__(self, parquet: Any, columns: list[str]) -> None:
        self._parquet, self._columns = parquet, columns
        self._row_bytes = 0
        """The most that the rows of a batch took on average; 0 before the first one."""

    def neighbours(self, groups: range) -> list[int]:
        """The first group and those behind it that fit into one batch with it, as FineWeb's of 1000 rows do: a call of
        parquet's reader, and one of a tokenizer's engine, cost a millisecond whatever they do."""
        found = list(groups[:1])
        rows, size = self._size(groups[0])
        for group in groups[1:] if self._row_bytes else []:
            more_rows, more = self._size(group)
            rows, size = rows + more_rows, size + more
            if rows > _ROWS or size > BATCH_BYTES:
                break
            found.append(group)
        return found

    def read(self, groups: list[int]) -> Iterator[Any]:
        """Record batches of consecutive row groups."""
        rows, size = map(sum, zip(*map(self._size, groups), strict=True))
        count = min(_ROWS if self._row_bytes else ROWS_PER_BATCH, BATCH_BYTES * rows // max(1, size))
        for batch in self._parquet.iter_batches(
            max(1, count), row_groups=groups, columns=self._columns, use_threads=False
        ):
            self._row_bytes = max(self._row_bytes, batch.nbytes // max(1, batch.num_rows), 1)
            yield batch

    def _size(self, group: int) -> tuple[int, int]:
        """Rows, and the bytes that they may take."""
        facts = self._parquet.metadata.row_group(group)
        return facts.num_rows, max(facts.total_byte_size, facts.num_rows * self._row_bytes)


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
            for _ in _Reader(parquet, columns).read([group]):
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
