"""Which side of a split a document falls to, from one value of its own.

Suffixes: D documents.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import numpy as np
import numpy.typing as npt
import xxhash


def split_position(key: str, seed: int) -> float:
    """0 <= x < 1, fixed by (key, seed) and spread evenly over keys."""
    return float(split_positions([key.encode()], seed)[0])


def split_positions(keys: Iterable[bytes], seed: int, purpose: str = "") -> npt.NDArray[np.float64]:
    """[D] the position of each key (UTF-8), by XXH3; for another purpose it is another one."""
    salt = xxhash.xxh3_64_intdigest(f"{seed}:{purpose}".encode())
    digests = b"".join(map(xxhash.xxh3_64_digest, keys, repeat(salt)))
    hashes = np.frombuffer(digests, ">u8").astype(np.uint64)
    # Without the lowest 11 bits every position is a float64 exactly, so that none is rounded up to 1.
    return (hashes >> np.uint64(11)) / 2**53
