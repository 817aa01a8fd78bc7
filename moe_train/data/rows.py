"""Sequences of a batch while they are written, and the batch that they become.

Suffixes: N = B sequences, S tokens per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class Batch:
    """B sequences of S tokens on the CPU."""

    ids_BS: torch.Tensor
    """int64: what the model reads."""
    labels_BS: torch.Tensor
    """int64: the next token of each position; meaningless where target_BS is False."""
    target_BS: torch.Tensor
    """bool: True where the label counts in the loss."""
    padding_BS: torch.Tensor
    """bool: True = padding."""
    sample_B: torch.Tensor
    """int64: global sample index; -1 for a row that is padding only."""
    domain_BS: torch.Tensor | None = None
    """int64: code of the domain of ids_BS; -1 at padding. None where it was not asked for."""
    position_BS: torch.Tensor | None = None
    """int64: offset inside the text, 0 where a text begins that does not see what stands before it (the padding behind
    the last one counts as such). None where a sequence is one text."""


class Rows:
    """N sequences of S tokens, padding only until a reader writes them.

    positions: restart them where a text begins.   domains: make room for labels.
    """

    def __init__(self, count: int, length: int, *, positions: bool = False, domains: bool = False) -> None:
        shape = (count, length)
        self.ids_NS, self.labels_NS = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self.target_NS, self.padding_NS = np.zeros(shape, bool), np.ones(shape, bool)
        self.sample_N = np.full(count, -1, np.int64)
        self.position_NS: npt.NDArray[np.int64] | None = np.zeros(shape, np.int64) if positions else None
        self.domain_NS: npt.NDArray[np.int64] | None = np.full(shape, -1, np.int64) if domains else None

    def batch(self) -> Batch:
        """Everything as one batch. The rows are not to be used any more."""
        return self.batches(len(self.sample_N))[0]

    def batches(self, size: int) -> list[Batch]:
        """Batches of `size` rows each, as tensors without a copy. The rows are not to be used any more."""
        if self.position_NS is not None and self.padding_NS.any():
            self._number_padding(self.position_NS)
        found = []
        for first in range(0, len(self.sample_N), size):
            part = slice(first, first + size)
            found.append(
                Batch(
                    ids_BS=torch.from_numpy(self.ids_NS[part]),
                    labels_BS=torch.from_numpy(self.labels_NS[part]),
                    target_BS=torch.from_numpy(self.target_NS[part]),
                    padding_BS=torch.from_numpy(self.padding_NS[part]),
                    sample_B=torch.from_numpy(self.sample_N[part]),
                    domain_BS=None if self.domain_NS is None else torch.from_numpy(self.domain_NS[part]),
                    position_BS=None if self.position_NS is None else torch.from_numpy(self.position_NS[part]),
                )
            )
        return found

    def _number_padding(self, position_NS: npt.NDArray[np.int64]) -> None:
        """Padding is a text of its own behind the others, so that its length does not lengthen theirs."""
        used_N = (~self.padding_NS).sum(axis=1)
        for row in np.flatnonzero(used_N < position_NS.shape[1]).tolist():
            position_NS[row, used_N[row] :] = np.arange(position_NS.shape[1] - used_N[row])
