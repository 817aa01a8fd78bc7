"""Which side of a split a document falls to, from one value of its own."""

from __future__ import annotations

import hashlib


def split_position(key: str, seed: int) -> float:
    """0 <= x < 1, fixed by (key, seed) and spread evenly over keys."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
