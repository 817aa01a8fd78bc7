from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from moe_train.data.dataset import open_dataset
from moe_train.data.index import write_index

Write = Callable[..., list[np.ndarray]]


def next_fit(lengths: list[int], size: int) -> list[int]:
    """One document after the other: the first ones of the sequences."""
    firsts, used = [], size
    for number, length in enumerate(lengths):
        inputs = min(length - 1, size)
        if inputs < 1:
            continue
        if used + inputs > size:
            firsts.append(number)
            used = 0
        used += inputs
    return firsts


@pytest.mark.parametrize("chunk", [1, 13, 400, 1 << 20])
@pytest.mark.parametrize("longest", [3, 40, 200])
def test_whole_documents_go_where_one_by_one_puts_them(
    tmp_path: Path, write_tokens: Write, longest: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of many documents and of one, documents without targets and longer than a sequence; chunks that begin
    within a sequence, hold none that begins, or begin all of them."""
    monkeypatch.setattr("moe_train.data.index._CHUNK", chunk)
    rng = np.random.default_rng(longest + chunk)
    lengths = (rng.integers(0, longest, 1500) * (rng.random(1500) < 0.9)).tolist()
    write_tokens(tmp_path / "p", lengths, cuts=[700])
    dataset = open_dataset(tmp_path / "p")
    for size in (1, 2, 16, 100, 3000, 10**6):
        stream = BytesIO()
        count = write_index(stream, dataset, size, pack=True)
        found = np.frombuffer(stream.getvalue(), "<i8").tolist()
        assert found == next_fit(lengths, size) and len(found) == count > 0
