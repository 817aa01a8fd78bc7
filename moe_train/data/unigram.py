"""What the best model that ignores context would reach on a data set.

Suffixes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moe_train.data.dataset import Dataset

_CHUNK = 1 << 22
_MOST = 1 << 26
_WINDOW = 1 << 16


class UnigramEntropy(NamedTuple):
    nats: float
    """Per token."""
    sample: int | None
    """Tokens that it was estimated from; None where all tokens of the data set were counted."""


def unigram_entropy(dataset: Dataset) -> UnigramEntropy:
    """Entropy of the distribution of tokens. ValueError for an empty data set.

    Up to 67,108,864 tokens all are counted. Of a larger data set so many are: windows of 65,536 tokens at even
    distances, the same ones each time. The entropy of a sample is too low by about types / (2 * tokens), that is 0.001
    nats for 150,000 types (Miller, "Note on the bias of information estimates", 1955), and off by what the windows
    happen to hold.
    """
    if not dataset.token_count:
        raise ValueError(f"{dataset.prefix} holds no tokens")
    counts_V = np.zeros(0, np.int64)
    for start, stop in _parts(dataset.token_count):
        found_V = np.bincount(dataset.read(start, stop))
        if len(found_V) > len(counts_V):
            counts_V = np.pad(counts_V, (0, len(found_V) - len(counts_V)))
        counts_V[: len(found_V)] += found_V
    total = int(counts_V.sum())
    shares = counts_V[counts_V > 0] / total
    return UnigramEntropy(float(-(shares * np.log(shares)).sum()), total if total < dataset.token_count else None)


def _parts(tokens: int) -> Iterator[tuple[int, int]]:
    """Start and end of what is counted; the first and the last token are among it."""
    if tokens <= _MOST:
        yield from ((start, min(start + _CHUNK, tokens)) for start in range(0, tokens, _CHUNK))
        return
    windows = _MOST // _WINDOW
    for number in range(windows):
        start = (tokens - _WINDOW) * number // (windows - 1)
        yield start, start + _WINDOW
