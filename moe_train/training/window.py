"""What the micro-batches of one optimizer step know of each other: sums for losses of scope global_batch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from moe_train.parallel.groups import Groups

_Key = tuple[str, int]


class Window:
    """Sums over the data-parallel ranks and the micro-batches of one step: of those so far, or, when all were measured
    first, of all of them.

    Every rank must ask for the same sums in the same order.
    """

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.running: dict[_Key, Tensor] = {}
        self.whole: dict[_Key, Tensor] | None = None
        """The sums of the whole step, once they are known."""

    def for_micro_batch(self) -> Callable[[str, int, Tensor], Tensor]:
        """The ``window_sum`` of one micro-batch; asked again in recomputation it answers from memory."""
        answers: dict[_Key, Tensor] = {}

        def window_sum(name: str, layer: int, x: Tensor) -> Tensor:
            key = (name, layer)
            if self.whole is not None:
                return self.whole[key]
            if key not in answers:
                total = self.groups.sum_over_data(x)
                if key in self.running:
                    total = total + self.running[key]
                self.running[key] = answers[key] = total
            return answers[key]

        return window_sum

    def for_measuring(self) -> Callable[[str, int, Tensor], Tensor]:
        """The ``window_sum`` of one micro-batch of a first pass: notes x, and answers with what this rank has noted so
        far, which must not decide anything but the value of losses."""

        answers: dict[_Key, Tensor] = {}

        def window_sum(name: str, layer: int, x: Tensor) -> Tensor:
            key = (name, layer)
            if key not in answers:
                self.running[key] = answers[key] = self.running[key] + x if key in self.running else x
            return answers[key]

        return window_sum

    def close_measuring(self) -> None:
        """After the first pass over all micro-batches: from now on every answer is the sum of the whole step."""
        self.whole = {key: self.groups.sum_over_data(self.running[key]) for key in sorted(self.running)}
