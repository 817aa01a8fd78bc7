from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from moe_train.data.indexed import IndexedDataset
from moe_train.data.prepare import How, PrepareOptions, prepare
from moe_train.data.prepare.choice import sides
from moe_train.data.prepare.names import token_prefix
from moe_train.data.sources import Rows, find_sources
from moe_train.data.tokenizers import Tokenizer

Manifests = dict[str, dict[str, Any]]


@pytest.fixture
def run(tokenizer: Tokenizer) -> Callable[..., Manifests]:
    """run(sources, prefix, options, **how): as the command, with pieces of a few kB."""

    def run(
        sources: list[Any], prefix: Any, options: PrepareOptions | None = None, text_format: Any = None, **how: Any
    ) -> Manifests:
        files = find_sources(sources, text_format)
        return prepare(files, prefix, tokenizer, options, How(**({"piece_bytes": 4000} | how)))

    return run


@pytest.fixture
def texts_of(tokenizer: Tokenizer) -> Callable[[Path], list[str]]:
    """The texts of a stem with one shard; checks that each ends, and only ends, with the end-of-document token."""

    def texts_of(stem: Path) -> list[str]:
        dataset = IndexedDataset(token_prefix(Path(stem), None))
        dataset.verify()
        texts = []
        for index in range(len(dataset)):
            ids = dataset.document(index)
            assert ids[-1] == tokenizer.eod_id and tokenizer.eod_id not in ids[:-1]
            texts.append(tokenizer.decode(ids))
        return texts

    return texts_of


def side(name: str, options: PrepareOptions) -> str:
    """The split of a document, from the value of its split column alone."""
    rows = Rows(0, 1, {options.split_column: [name]})
    place = sides(rows, rows.labels(options.split_column), np.zeros(1, np.int64), options)[0]
    return options.splits[int(place)]


def origins(stem: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(f"{stem}.documents.parquet").to_pylist())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
