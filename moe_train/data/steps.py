"""The micro-batches of one rank, step by step.

Suffixes: R samples of a step on this rank, N samples of several steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moe_train.data.batches import Batch, rank_slice
from moe_train.data.training_set import TrainingSet

_LOCATED_AT_ONCE = 4096
_TOKENS_AT_ONCE = 1 << 17


class StepReader:
    """What a rank reads in each step, as a function of the step's number.

    A call costs as much as many short rows, whatever it does. So places are computed for about 4096 samples of this
    rank at a time and 131,072 tokens are read at a time; at least those of one step. What has been read ahead is no
    state: a new reader gives the same batches from any step on.

    batch_size: samples of a step over all ranks and micro-batches.   rank, dp_size: as for `batches.rank_slice`.
    """

    def __init__(
        self, samples: TrainingSet, *, batch_size: int, micro_size: int, rank: int = 0, dp_size: int = 1
    ) -> None:
        assert batch_size % (micro_size * dp_size) == 0, "a step is whole micro-batches on every rank"
        self.samples, self.batch_size, self.micro_size = samples, batch_size, micro_size
        firsts = [rank_slice(0, i, rank, dp_size, micro_size) for i in range(batch_size // (micro_size * dp_size))]
        self._offset_R = (np.array(firsts)[:, None] + np.arange(micro_size)).reshape(-1)
        self._next, self._steps = 0, self._from(0)

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step (from 0), in their order; they share memory with other steps'.

        Steps that do not follow each other cost a read each.
        """
        if step != self._next:
            self._steps = self._from(step)
        self._next = step + 1
        return next(self._steps)

    def _from(self, step: int) -> Iterator[list[Batch]]:
        rows, accumulation = len(self._offset_R), len(self._offset_R) // self.micro_size
        at_once = max(1, _TOKENS_AT_ONCE // (rows * self.samples.sequence_length)) * rows
        located = -(-_LOCATED_AT_ONCE // at_once) * at_once
        while True:
            steps = np.arange(step, step + located // rows)
            index_N = (steps[:, None] * self.batch_size + self._offset_R).reshape(-1)
            member_N, place_N = self.samples.locate(index_N)
            for first in range(0, located, at_once):
                part = slice(first, first + at_once)
                batches = self.samples.read(index_N[part], member_N[part], place_N[part]).batches(self.micro_size)
                for begin in range(0, len(batches), accumulation):
                    yield batches[begin : begin + accumulation]
            step += len(steps)
