"""The micro-batches of one rank, step by step."""

from __future__ import annotations

from moe_train.data.batches import Batch, rank_slice
from moe_train.data.training_set import TrainingSet

_TOKENS_AT_ONCE = 1 << 17


class StepReader:
    """What a rank reads in each step, as a function of the step's number.

    Steps are read some at a time, since a read costs as much as many short rows: as many as have 131,072 tokens of this
    rank, at least one. What has been read ahead is no state: a new reader gives the same batches from any step on.

    batch_size: samples of a step over all ranks and micro-batches.   rank, dp_size: as for `batches.rank_slice`.
    """

    def __init__(
        self, samples: TrainingSet, *, batch_size: int, micro_size: int, rank: int = 0, dp_size: int = 1
    ) -> None:
        assert batch_size % (micro_size * dp_size) == 0, "a step is whole micro-batches on every rank"
        self.samples, self.batch_size, self.micro_size = samples, batch_size, micro_size
        self.rank, self.dp_size, self.accumulation = rank, dp_size, batch_size // (micro_size * dp_size)
        self._ahead = max(1, _TOKENS_AT_ONCE * dp_size // (batch_size * samples.sequence_length))
        self._first, self._held = 0, list[Batch]()

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step (from 0), in their order; they share memory with other steps'."""
        if not 0 <= (step - self._first) * self.accumulation < len(self._held):
            self._first, self._held = step, self._read(step)
        at = (step - self._first) * self.accumulation
        return self._held[at : at + self.accumulation]

    def _read(self, step: int) -> list[Batch]:
        starts = [
            rank_slice(number * self.batch_size, index, self.rank, self.dp_size, self.micro_size)
            for number in range(step, step + self._ahead)
            for index in range(self.accumulation)
        ]
        return self.samples.batches(starts, self.micro_size)
