"""Groups of documents that share much of their text, found by exact shingle overlap.

A shingle is 8 consecutive words or signs. Two documents belong together where the smaller one shares at least half of
its distinct shingles with the other (containment rather than Jaccard's ratio, so that an excerpt joins its source), and
so do those connected through others. Work and memory grow with the text, hence for a small corpus only.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_WORD = re.compile(r"\w+|[^\w\s]")
_SHINGLE = 8
_CONTAINED = 0.5


class Groups:
    """Union-find over 0 <= item < size; a group's name is its smallest item."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def find(self, item: int) -> int:
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def join(self, left: int, right: int) -> None:
        low, high = sorted((self.find(left), self.find(right)))
        self._parent[high] = low


def join_near_duplicates(texts: Sequence[str], groups: Groups) -> None:
    """Joins in `groups` the indices of texts that are near-duplicates of each other."""
    words: dict[str, int] = {}
    shingles = [_shingles(text, words) for text in texts]
    sizes = np.array([len(one) for one in shingles], dtype=np.int64)
    owners = np.repeat(np.arange(len(texts)), sizes)
    values = np.concatenate(shingles) if shingles else np.zeros(0, np.uint64)
    order = np.argsort(values, kind="stable")
    owners = owners[order]
    _, first, count = np.unique(values[order], return_index=True, return_counts=True)
    shared = np.flatnonzero(count > 1)
    # For each document, the documents that hold each of its shared shingles.
    holders: list[list[npt.NDArray[np.int64]]] = [[] for _ in texts]
    for begin, length in zip(first[shared], count[shared], strict=True):
        together = owners[begin : begin + length]
        for owner in together:
            holders[owner].append(together)
    for owner, parts in enumerate(holders):
        if not parts:
            continue
        others, overlap = np.unique(np.concatenate(parts), return_counts=True)
        for other in others[overlap >= _CONTAINED * np.minimum(sizes[others], sizes[owner])]:
            groups.join(owner, int(other))


def _shingles(text: str, words: dict[str, int]) -> npt.NDArray[np.uint64]:
    """Distinct hashes of a text's shingles; a text shorter than one shingle is one as a whole."""
    codes = []
    for word in _WORD.findall(text):
        if word not in words:
            words[word] = zlib.crc32(word.encode()) + 1
        codes.append(words[word])
    row = np.array(codes or [0], dtype=np.uint64)
    count = max(1, len(row) - _SHINGLE + 1)
    value = np.zeros(count, np.uint64)
    for offset in range(min(_SHINGLE, len(row))):
        value = value * np.uint64(0x9E3779B97F4A7C15) + row[offset : offset + count]
    return np.unique(value)
