"""Where a document comes from: rows of the documents table that `prepare` writes, read a row group at a time."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from moe_train.data.domains import documents_path

_COLUMNS = ["source", "row", "id", "domain"]


@dataclass(frozen=True)
class Origin:
    source: str
    """File, relative to the folder of the sources."""
    row: int
    """Row or line of that file, from 0."""
    id: str
    domain: str


class Origins:
    """The origin of any document of a data set; keeps the last row group that it has read.

    stem: of the data set (`dataset.sidecar_stem`). Errors: FileNotFoundError without a table.
    """

    def __init__(self, stem: str | Path) -> None:
        import pyarrow.parquet as pq

        path = documents_path(stem)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; origins are known only for data written by prepare")
        self._table = pq.ParquetFile(path)
        metadata = self._table.metadata
        sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self._bounds = [0, *accumulate(sizes)]
        self._held: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self._bounds[-1]

    def __getitem__(self, document: int) -> Origin:
        """IndexError where there is no such document."""
        if not 0 <= document < len(self):
            raise IndexError(f"the documents table has rows 0 to {len(self) - 1}, not {document}")
        group = bisect.bisect_right(self._bounds, document) - 1
        if self._held is None or self._held[0] != group:
            self._held = group, self._table.read_row_group(group, columns=_COLUMNS)
        values = self._held[1].slice(document - self._bounds[group], 1).to_pylist()[0]
        return Origin(values["source"], values["row"], values["id"], values["domain"])
