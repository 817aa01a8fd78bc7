"""How often each token occurs in a data set.

Suffixes: V token ids.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_train.data.dataset import Dataset

_CHUNK = 1 << 22


def token_counts(dataset: Dataset) -> npt.NDArray[np.int64]:
    """[V] occurrences of each id up to the largest that occurs; all tokens are read."""
    counts_V = np.zeros(0, np.int64)
    for start in range(0, dataset.token_count, _CHUNK):
        found_V = np.bincount(dataset.read(start, min(start + _CHUNK, dataset.token_count)), minlength=len(counts_V))
        found_V[: len(counts_V)] += counts_V
        counts_V = found_V
    return counts_V


def write_token_counts(dataset: Dataset, path: Path) -> int:
    """Writes the counts as a JSON list, which gate ``hash`` reads; returns how many ids occur. ValueError for a data
    set without tokens or a folder that does not exist."""
    if not dataset.token_count:
        raise ValueError(f"{dataset.prefix} holds no tokens")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
    counts_V = token_counts(dataset)
    path.write_text(json.dumps(counts_V.tolist()) + "\n")
    return int((counts_V > 0).sum())
