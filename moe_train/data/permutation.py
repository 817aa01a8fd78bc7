"""A pseudo-random order of 0 .. size - 1 that is computed, not stored.

Suffixes: N indices.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_ROUNDS = 4


def permuted(index: int, size: int, seed: int, epoch: int) -> int:
    """The image of an index under a pseudo-random bijection of 0 <= index < size, in constant time and memory.

    A Feistel network over pairs (left, right), left < rows and right < columns with rows * columns just above `size`;
    images outside the range are mapped again until they fall inside (cycle walking: Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002).
    """
    assert 0 <= index < size
    rows, columns, keys = _network(size, seed, epoch)
    while True:
        left, right = divmod(index, columns)
        for key_left, key_right in keys:
            left = (left + _mix(right ^ key_left)) % rows
            right = (right + _mix(left ^ key_right)) % columns
        index = left * columns + right
        if index < size:
            return index


def permuted_many(index_N: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """`permuted` of each index, [N] int64, all at once."""
    assert index_N.size == 0 or 0 <= int(index_N.min()) <= int(index_N.max()) < size
    rows, columns, keys = _network(size, seed, epoch)
    rows_u, columns_u = np.uint64(rows), np.uint64(columns)
    out_N = index_N.astype(np.uint64)
    # Those that still lie outside of the range; all of them before the first round.
    walking = np.arange(out_N.size)
    while walking.size:
        left, right = np.divmod(out_N[walking], columns_u)
        for key_left, key_right in keys:
            # Reduced before the sum, which may not fit into 64 bits otherwise; the scalar function need not care.
            left = (left + _mix_many(right ^ np.uint64(key_left)) % rows_u) % rows_u
            right = (right + _mix_many(left ^ np.uint64(key_right)) % columns_u) % columns_u
        images = left * columns_u + right
        out_N[walking] = images
        walking = walking[images >= np.uint64(size)]
    return out_N.astype(np.int64)


@lru_cache(maxsize=64)
def _network(size: int, seed: int, epoch: int) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    rows = max(1, round(size**0.5))
    columns = -(-size // rows)
    digest = hashlib.shake_128(f"packed sampler {seed} {epoch} {size}".encode()).digest(16 * _ROUNDS)
    words = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8)]
    return rows, columns, tuple(zip(words[::2], words[1::2], strict=True))


def _mix(value: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mix_many(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
