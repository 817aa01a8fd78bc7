from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moe_train.data import token_counts
from moe_train.data.dataset import open_dataset
from moe_train.data.indexed import IndexedWriter


@pytest.mark.parametrize("chunk", [3, 1000])
def test_every_token_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    draw = np.random.default_rng()
    documents = [draw.integers(0, 30, length) for length in (7, 1, 12)]
    with IndexedWriter(tmp_path / "set", 100) as writer:
        for ids in documents:
            writer.add(ids)
    monkeypatch.setattr(token_counts, "_CHUNK", chunk)
    want = Counter(np.concatenate(documents).tolist())
    found = token_counts.write_token_counts(open_dataset(tmp_path / "set"), tmp_path / "counts.json")
    assert found == len(want)
    assert json.loads((tmp_path / "counts.json").read_text()) == [want[v] for v in range(max(want) + 1)]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "set", 100) as writer:
        writer.add([1, 2])
    with pytest.raises(ValueError, match="there is no folder"):
        token_counts.write_token_counts(open_dataset(tmp_path / "set"), tmp_path / "no" / "counts.json")
