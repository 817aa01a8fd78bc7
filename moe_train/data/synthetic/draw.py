"""Random choices that are the same on every machine and with every version of Python."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Choices fixed by a key: the same key gives the same choices in the same order.

    Only `random.Random.random` is used, whose sequence Python promises to keep for a seed; how `choice` and `shuffle`
    use it is not promised.
    """

    def __init__(self, *key: str | int) -> None:
        name = "/".join(str(part) for part in key)
        self._random = random.Random(int.from_bytes(hashlib.sha256(name.encode()).digest(), "big"))

    def below(self, count: int) -> int:
        """0 <= n < count."""
        assert count > 0, "nothing to choose from"
        return int(self._random.random() * count)

    def between(self, lowest: int, highest: int) -> int:
        """lowest <= n <= highest."""
        return lowest + self.below(highest - lowest + 1)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """``count`` different places of ``items``, in random order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]
