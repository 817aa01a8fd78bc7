"""Domain labels of tokens, from the documents table that `prepare` writes.

Suffixes: S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_train.data.dataset import Dataset

_ROWS = 1 << 16

Codes = npt.NDArray[np.signedinteger[Any]]


def documents_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.documents.parquet")


class Domains:
    """The domain of each document of a data set; a row without a label has "".

    names: label of each code, sorted.   codes: [documents], in the smallest signed type that holds them: one byte per
    document for up to 128 labels.
    Errors: FileNotFoundError without a documents table, ValueError where it is not one of this data set.
    """

    def __init__(self, dataset: Dataset) -> None:
        path = documents_path(dataset.stem)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; domains are known only for data written by prepare")
        self.dataset = dataset
        self.names, self.codes = _read(path, dataset)

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
        new = np.array([names.index(name) for name in table.names], _code_type(len(names)))
        table.codes, table.names = new[table.codes], names
    return names


def _read(path: Path, dataset: Dataset) -> tuple[list[str], Codes]:
    """Names and codes, a part of the table at a time: labels are never held as strings for all documents."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as table:
        if table.metadata.num_rows != len(dataset):
            raise ValueError(
                f"{path} describes {table.metadata.num_rows} documents, {dataset.prefix} has {len(dataset)}"
            )
        if "domain" not in table.schema_arrow.names:
            raise ValueError(f"{path} has no column domain; it is not a table that prepare has written")
        known: dict[str, int] = {}
        codes: Codes = np.empty(len(dataset), _code_type(1))
        done = 0
        for batch in table.iter_batches(_ROWS, columns=["domain"]):
            labels = pc.fill_null(batch.column(0).cast(pa.large_string()), "").dictionary_encode()
            new = [known.setdefault(label, len(known)) for label in labels.dictionary.to_pylist()]
            codes = codes.astype(_code_type(len(known)), copy=False)
            codes[done : done + len(labels)] = np.array(new, codes.dtype)[labels.indices.to_numpy()]
            done += len(labels)
    names = sorted(known)
    place = {name: number for number, name in enumerate(names)}
    return names, np.array([place[name] for name in known], codes.dtype)[codes]


def _code_type(labels: int) -> np.dtype[Any]:
    """The smallest signed integers that count so many labels (signed: -1 stands for no label elsewhere)."""
    return np.min_scalar_type(-max(labels, 1))
