from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_train.data.domains import documents_path
from moe_train.data.origins import Origin, Origins


def test_only_the_row_group_of_a_document_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Origin(f"file{i % 3}", i, f"id-{i}", "") for i in range(20)]
    table = pa.Table.from_pylist([vars(row) for row in rows])
    pq.write_table(table, documents_path(tmp_path / "p"), row_group_size=6)
    read: list[int] = []
    whole = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, group: int, **more: object) -> pa.Table:
        read.append(group)
        return whole(self, group, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    origins = Origins(tmp_path / "p")
    assert len(origins) == 20 and read == []
    assert [origins[i] for i in (7, 11, 8)] == [rows[7], rows[11], rows[8]] and read == [1]
    assert [origins[i] for i in range(20)] == rows and read == [1, 0, 1, 2, 3]
    with pytest.raises(IndexError, match="rows 0 to 19, not 20"):
        origins[20]
    with pytest.raises(FileNotFoundError, match="written by prepare"):
        Origins(tmp_path / "q")
