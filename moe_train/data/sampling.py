"""Which place of a data set the i-th sample reads: a fixed function, the same for any number of ranks.

Suffixes: N samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moe_train.data.manifest import content_of
from moe_train.data.permutation import permuted, permuted_many
from moe_train.data.readers import Reader


class Sampler:
    """The samples of one data set in another seeded order each epoch.

    The index of a sample runs over all epochs; the state of training is one integer, the number of samples consumed.
    Nothing is stored per sample: the order is computed.

    reader: what the places of the data set are.   seed: of the order.   shuffle: False visits them as they lie.
    Errors: ValueError where the data set is smaller than one sample.
    """

    def __init__(self, reader: Reader, seed: int, shuffle: bool = True) -> None:
        self.reader, self.seed, self.shuffle = reader, seed, shuffle
        self.samples_per_epoch = reader.count
        if self.samples_per_epoch < 1:
            raise ValueError(f"{reader.dataset.prefix} is too small: {reader.too_small()}")

    def place(self, index: int) -> int:
        """The place that a sample index (of any epoch) stands for."""
        if index < 0:
            raise ValueError(f"sample indices start at 0, not {index}")
        epoch, step = divmod(index, self.samples_per_epoch)
        return permuted(step, self.samples_per_epoch, self.seed, epoch) if self.shuffle else step

    def places(self, index_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """`place` of each index, [N]."""
        epoch_N, step_N = np.divmod(index_N, self.samples_per_epoch)
        if not self.shuffle:
            return step_N
        out_N = np.empty_like(step_N)
        for epoch in np.unique(epoch_N).tolist():
            of_epoch_N = epoch_N == epoch
            out_N[of_epoch_N] = permuted_many(step_N[of_epoch_N], self.samples_per_epoch, self.seed, epoch)
        return out_N

    def identity(self) -> dict[str, Any]:
        """What decides which tokens a sample is, besides seed, order and the tokens themselves."""
        dataset = self.reader.dataset
        size = {"documents": len(dataset), "tokens": dataset.token_count}
        return {**size, "content": content_of(dataset.stem), **self.reader.identity()}

    def epochs(self, samples: int) -> float:
        """How many times so many samples pass over the data."""
        return samples / self.samples_per_epoch
