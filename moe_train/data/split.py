"""Which side of a split a document falls to, from one value of its own.

Suffixes: D documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


def split_position(key: str, seed: int) -> float:
    """0 <= x < 1, fixed by (key, seed) and spread evenly over keys."""
    return float(split_positions([key], seed)[0])


def split_positions(keys: Iterable[str], seed: int, purpose: str = "") -> npt.NDArray[np.float64]:
    """[D] the position of each key; for another purpose it is another one."""
    salt, blake2b = f"{seed}:{purpose}", hashlib.blake2b
    digests = b"".join([blake2b((salt + key).encode(), digest_size=8).digest() for key in keys])
    return np.frombuffer(digests, "<u8") / 2**64
