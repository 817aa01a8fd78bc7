"""What the best model that ignores context would reach on a data set.

Suffixes: V vocabulary.
"""

from __future__ import annotations

import numpy as np

from moe_train.data.dataset import Dataset

_CHUNK = 1 << 22


def unigram_entropy(dataset: Dataset) -> float:
    """Entropy of the distribution of tokens, in nats per token; reads all of it. ValueError for an empty data set."""
    if not dataset.token_count:
        raise ValueError(f"{dataset.prefix} holds no tokens")
    counts_V = np.zeros(0, np.int64)
    for start in range(0, dataset.token_count, _CHUNK):
        found_V = np.bincount(dataset.read(start, min(start + _CHUNK, dataset.token_count)))
        if len(found_V) > len(counts_V):
            counts_V = np.pad(counts_V, (0, len(found_V) - len(counts_V)))
        counts_V[: len(found_V)] += found_V
    shares = counts_V[counts_V > 0] / counts_V.sum()
    return float(-(shares * np.log(shares)).sum())
