"""Intervals over seeds by the bootstrap: what is known from a handful of runs, and no more.

Suffixes: R resamples, N seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
SEED = 0
LEVEL = 0.95
COVERED = {2: 50, 3: 75, 4: 80, 5: 84, 6: 86}
"""Per cent of all cases in which the interval of so many seeds covers the mean."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds; low and high are None for a single seed."""

    mean: float
    low: float | None
    high: float | None
    values: list[float]

    def to_json(self) -> dict[str, object]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "values": self.values}


def interval(values: Sequence[float]) -> Interval | None:
    """Mean and 95 % percentile interval of the mean (Efron and Tibshirani 1993, section 13.3); None without values.

    10,000 resamples with replacement from a generator of fixed seed, so that the same values give the same interval.
    With N values there are no more than N^N different resamples: of two or three seeds, the ends are always the lowest
    and the highest value.
    """
    if not values:
        return None
    numbers = [float(value) for value in values]
    mean = float(np.mean(numbers))
    if len(numbers) == 1:
        return Interval(mean, None, None, numbers)
    generator = np.random.default_rng(SEED)
    picked_RN = generator.integers(len(numbers), size=(RESAMPLES, len(numbers)))
    means_R = np.asarray(numbers)[picked_RN].mean(axis=1)
    low, high = np.quantile(means_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high), numbers)


def paired(values: dict[int, float], baseline: dict[int, float]) -> Interval | None:
    """The interval of the difference to a baseline over the seeds that both have, taken seed by seed.

    values, baseline: by seed. Runs of one seed read the same samples in the same order, which the difference takes out.
    """
    return interval([values[seed] - baseline[seed] for seed in values if seed in baseline])


def worth(seeds: int) -> str:
    """A sentence on what the interval of so many seeds is worth; empty from seven on, where it is nearly what it says.

    The shares are of a simulation with normally distributed values.
    """
    if seeds < 2:
        return "One seed: there is no interval (a dash), and a small difference between two arms may be chance."
    if seeds not in COVERED:
        return ""
    ends = "are the lowest and the highest value" if seeds < 4 else "lie near the lowest and the highest value"
    return (
        f"With {seeds} seeds the ends of an interval {ends}; of normally distributed values it covers the true mean in "
        f"about {COVERED[seeds]} % of all cases, not in 95 %."
    )
