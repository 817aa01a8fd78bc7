"""Random numbers of one sequence: a function of the seed and the prompt, not of the batch that it is in."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

_BITS = 48
"""Of a number: with these, times any sum of probabilities it stays below that sum in float64."""


class RandomNumbers:
    """Uniform numbers in [0, 1), one per token of a sequence.

    ``copy`` tells equal prompts apart. Neither neighbours nor their order, nor ranks, nor the cache have a part in it.
    """

    def __init__(self, seed: int, prompt: Sequence[int], copy: int) -> None:
        text = repr((seed, copy, [int(token) for token in prompt]))
        self._key = hashlib.blake2b(text.encode(), digest_size=32).digest()

    def at(self, index: int) -> float:
        """For the token with this number, from 0, behind the prompt."""
        word = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8, key=self._key).digest()
        return (int.from_bytes(word, "little") >> (64 - _BITS)) / 2**_BITS


def numbers_of(seed: int, prompts: Sequence[Sequence[int]]) -> list[RandomNumbers]:
    """Those of each prompt; the n-th of several equal prompts has the same ones wherever it stands."""
    seen: Counter[tuple[int, ...]] = Counter()
    found = []
    for prompt in prompts:
        key = tuple(int(token) for token in prompt)
        found.append(RandomNumbers(seed, key, seen[key]))
        seen[key] += 1
    return found
