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
    """int64: the next token of each position, also where it is no target; meaningless at padding."""
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
        """Whole batches of `size` rows each, as tensors without a copy. The rows are not to be used any more."""
        if self.position_NS is not None and self.padding_NS.any():
            self._number_padding(self.position_NS)
        columns = (self.ids_NS, self.labels_NS, self.target_NS, self.padding_NS, self.sample_N)
        more = (self.domain_NS, self.position_NS)
        whole = [None if column is None else torch.from_numpy(column) for column in (*columns, *more)]
        count = len(self.sample_N) // size
        assert count * size == len(self.sample_N)
        if count == 1:
            return [Batch(*whole)]  # type: ignore[arg-type]
        # Views of one tensor per column: making a tensor costs more than filling a short row.
        nothing = (None,) * count
        parts = [nothing if x is None else x.view(count, size, *x.shape[1:]).unbind() for x in whole]
        return [Batch(*values) for values in zip(*parts, strict=True)]  # type: ignore[arg-type]

    def _number_padding(self, position_NS: npt.NDArray[np.int64]) -> None:
        """Padding is a text of its own behind the others, so that its length does not lengthen theirs."""
        used_N = (~self.padding_NS).sum(axis=1)
        for row in np.flatnonzero(used_N < position_NS.shape[1]).tolist():
            position_NS[row, used_N[row] :] = np.arange(position_NS.shape[1] - used_N[row])
