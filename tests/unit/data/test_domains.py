from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_train.data.dataset import Dataset, open_dataset
from moe_train.data.domains import Domains, documents_path, renumber

Write = Callable[..., list[np.ndarray]]


def labelled(folder: Path, write_tokens: Write, name: str, column: pa.Array, rows: int = 50) -> Dataset:
    """Documents with these labels, the table in row groups of so many rows."""
    write_tokens(folder / name, [2] * len(column))
    pq.write_table(pa.table({"row": range(len(column)), "domain": column}), documents_path(folder / name), rows)
    return open_dataset(folder / name)


@pytest.mark.parametrize(("labels", "dtype"), [(1, "i1"), (128, "i1"), (129, "i2"), (1000, "i2"), (40_000, "i4")])
def test_codes_are_those_of_all_labels_sorted(
    tmp_path: Path, write_tokens: Write, labels: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the smallest type, although labels turn up one after the other and parts of the table are small."""
    monkeypatch.setattr("moe_train.data.domains._ROWS", max(7, labels // 10))
    rng = np.random.default_rng(labels)
    names = [f"é{n}" if n % 3 else f"{n}" for n in range(labels)]
    given = [names[n] for n in [*range(labels), *rng.integers(0, labels, labels // 2 + 60)]]
    domains = Domains(labelled(tmp_path, write_tokens, "p", pa.array(given), max(50, labels // 4)))
    expected, codes = np.unique(np.array(given), return_inverse=True)
    assert domains.names == expected.tolist() and domains.codes.dtype == dtype
    assert domains.codes.tolist() == codes.tolist()


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_columns_of_any_text_type(tmp_path: Path, write_tokens: Write, kind: pa.DataType) -> None:
    given = ["web", None, "code", "", "web"]
    domains = Domains(labelled(tmp_path, write_tokens, "p", pa.array(given, pa.string()).cast(kind), 2))
    assert [domains.names[code] for code in domains.codes] == ["web", "", "code", "", "web"]
    assert domains.names == ["", "code", "web"]


def test_numbers_as_labels_and_no_document(tmp_path: Path, write_tokens: Write) -> None:
    assert Domains(labelled(tmp_path, write_tokens, "n", pa.array([10, 9, 10]))).names == ["10", "9"]
    write_tokens(tmp_path / "e", [])
    pq.write_table(pa.table({"domain": pa.array([], pa.string())}), documents_path(tmp_path / "e"))
    nothing = Domains(open_dataset(tmp_path / "e"))
    assert nothing.names == [] and len(nothing.codes) == 0


def test_common_codes_fit_however_many_labels_there_are_together(tmp_path: Path, write_tokens: Write) -> None:
    given = [[f"{letter}{n:03d}" for n in range(100)] for letter in "ba"]
    tables = [
        Domains(labelled(tmp_path, write_tokens, name, pa.array(labels)))
        for name, labels in zip("xy", given, strict=True)
    ]
    assert [table.codes.dtype for table in tables] == ["i1", "i1"]
    names = renumber(tables)
    assert names == sorted(given[0] + given[1])
    for table, labels in zip(tables, given, strict=True):
        assert [names[code] for code in table.codes] == labels and table.names == names


def test_a_table_of_something_else(tmp_path: Path, write_tokens: Write) -> None:
    labelled(tmp_path, write_tokens, "t", pa.array(["web"]))
    pq.write_table(pa.table({"text": ["web"]}), documents_path(tmp_path / "t"))
    with pytest.raises(ValueError, match="t.documents.parquet has no column domain"):
        Domains(open_dataset(tmp_path / "t"))
