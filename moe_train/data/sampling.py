"""Which tokens the i-th training sample is: fixed by (data set, length, seed), the same for any number of ranks.

Suffixes: S tokens per sequence.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from moe_train.data.indexed import IndexedDataset

_MASK = (1 << 64) - 1
_ROUNDS = 4


class PackedSampler:
    """Windows of S+1 tokens with stride S over all documents joined, in another seeded order each epoch.

    A window may span documents. Every token but the first of the stream is a target exactly once per epoch (those
    after the last whole window excepted), also a document's first token, which is predicted from the end-of-document
    token and the document before.

    The index of a sample runs over all epochs; the state of training is one integer, the number of samples consumed.
    Nothing is stored per sample: the order is computed (`permuted`).

    dataset: the tokens.   sequence_length: S.   seed: of the order.   shuffle: False visits windows in stream order.
    Errors: ValueError where the data set is smaller than one sample.
    """

    def __init__(self, dataset: IndexedDataset, sequence_length: int, seed: int, shuffle: bool = True) -> None:
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, not {sequence_length}")
        self.dataset, self.sequence_length, self.seed, self.shuffle = dataset, sequence_length, seed, shuffle
        self.samples_per_epoch = (dataset.token_count - 1) // sequence_length
        if self.samples_per_epoch < 1:
            raise ValueError(
                f"{dataset.prefix} has {dataset.token_count} tokens, fewer than one sample needs "
                f"({sequence_length + 1} for sequence_length {sequence_length})"
            )

    def window(self, index: int) -> int:
        """Position in the stream, in samples, that a sample index (of any epoch) stands for."""
        if index < 0:
            raise ValueError(f"sample indices start at 0, not {index}")
        epoch, place = divmod(index, self.samples_per_epoch)
        return permuted(place, self.samples_per_epoch, self.seed, epoch) if self.shuffle else place

    def start(self, index: int) -> int:
        """Position in the stream, in tokens, of a sample's first token."""
        return self.window(index) * self.sequence_length

    def sample(self, index: int) -> npt.NDArray[np.int64]:
        """[S+1] token ids of a sample: the model reads the first S, the last S are the targets."""
        start = self.start(index)
        return self.dataset.tokens[start : start + self.sequence_length + 1].astype(np.int64)

    def identity(self) -> dict[str, int | bool]:
        """What decides which tokens sample i is, besides the tokens themselves."""
        return {
            "tokens": self.dataset.token_count,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def epochs(self, samples: int) -> float:
        """How many times a run of so many samples passes over the data."""
        return samples / self.samples_per_epoch

    def describe(self, samples: int) -> str:
        """One line for the start of a run of so many samples."""
        need, have = samples * self.sequence_length, self.samples_per_epoch * self.sequence_length
        line = f"{self.dataset.prefix}: {have:,} tokens; the run reads {need:,}, {self.epochs(samples):.2f} epochs"
        return line + (" (not enough for one pass: tokens repeat)" if need > have else "")


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
