"""Whether a loss is a spike: a robust z-score against the losses of the steps before."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

NORMAL = 1.4826
"""Standard deviation / MAD of a normal distribution: 1 / Phi^-1(3/4)."""
FLOOR = 1e-3
"""The scale counts as at least this part of the median: a loss that hardly moves has no spikes of its fourth digit."""


class Losses:
    """The losses of the last steps that were taken, oldest first; ``size`` of them at most."""

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self.values = deque(values, maxlen=size)

    def add(self, loss: float) -> None:
        self.values.append(loss)

    def score(self, loss: float) -> float | None:
        """(loss - median) / max(1.4826 * MAD, 0.001 * |median|), with MAD the median of the distances from the median
        (Hampel 1974); None until there are ``size`` losses."""
        if len(self.values) < (self.values.maxlen or 0):
            return None
        middle = statistics.median(self.values)
        spread = NORMAL * statistics.median(abs(value - middle) for value in self.values)
        scale = max(spread, FLOOR * abs(middle))
        if not scale:
            return 0.0 if loss <= middle else math.inf
        return (loss - middle) / scale

    def median(self) -> float | None:
        return statistics.median(self.values) if self.values else None
