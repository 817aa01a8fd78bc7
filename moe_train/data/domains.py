"""Domain labels of tokens, from the documents table that `prepare` writes.

Suffixes: S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_train.data.dataset import Dataset


def documents_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.documents.parquet")


class Domains:
    """The domain of each document of a data set.

    names: label of each code, sorted.   codes: [documents] int32.
    Errors: FileNotFoundError without a documents table, ValueError where it is not one of this data set.
    """

    def __init__(self, dataset: Dataset) -> None:
        import pyarrow.parquet as pq

        path = documents_path(dataset.stem)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; domains are known only for data written by prepare")
        labels = pq.read_table(path, columns=["domain"]).column("domain").to_numpy()
        if len(labels) != len(dataset):
            raise ValueError(f"{path} describes {len(labels)} documents, {dataset.prefix} has {len(dataset)}")
        self.dataset = dataset
        names, codes = np.unique(labels.astype(str), return_inverse=True)
        self.names: list[str] = [str(name) for name in names]
        self.codes: npt.NDArray[np.int32] = codes.astype(np.int32)

    def of_tokens(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """[S] codes of the tokens at start <= position < start + count; an end-of-document token has its document's."""
        if count == 0:
            return np.zeros(0, np.int64)
        first = self.dataset.document_at(start)
        last = self.dataset.document_at(start + count - 1)
        bounds = self.dataset.document_bounds(first, last + 1)[:-1]
        bounds[0] = start
        lengths = np.diff(bounds, append=start + count)
        return np.repeat(self.codes[first : last + 1].astype(np.int64), lengths)


def renumber(tables: Sequence[Domains]) -> list[str]:
    """Gives the domains of several data sets common codes; returns all names, sorted. Changes the tables."""
    names = sorted({name for table in tables for name in table.names})
    for table in tables:
        new = np.array([names.index(name) for name in table.names], np.int32)
        table.codes, table.names = new[table.codes], names
    return names
