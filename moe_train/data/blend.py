"""Which data set of a blend each sample comes from, by a short pattern that repeats.

Suffixes: M members, P entries of the pattern, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

LONGEST = 8192

Integers = npt.NDArray[np.int64]


class Pattern:
    """Spreads samples over members so that every beginning of the sequence has the members' shares.

    The weights become integers that add up to the period P (at most 8192, the one that fits them best), and one period
    is a sequence with so many entries of each. After any number of samples below one period a member is less than one
    sample away from its share; what rounding to integers leaves is at most 1 in 2 P of the samples.

    weights_M: positive; their sum does not matter.
    Errors: ValueError where a weight is not positive, or too small beside the others to get one entry of a period.
    """

    def __init__(self, weights_M: Sequence[float]) -> None:
        weights = np.asarray(weights_M, np.float64)
        if weights.size == 0 or not (np.isfinite(weights).all() and (weights > 0).all()):
            raise ValueError(f"weights of a blend must be greater than 0, got {list(weights_M)}")
        self.counts_M = _integer_shares(weights / weights.sum())
        self.entries_P = _spread(self.counts_M)
        self._ordinals_P = _ordinals(self.entries_P, len(weights))

    @property
    def period(self) -> int:
        return len(self.entries_P)

    def locate(self, index_N: Integers) -> tuple[Integers, Integers]:
        """Member of each sample, and which of that member's samples it is (both [N], from 0)."""
        period_N, place_N = np.divmod(index_N, self.period)
        member_N = self.entries_P[place_N]
        return member_N, period_N * self.counts_M[member_N] + self._ordinals_P[place_N]

    def counts_before(self, samples: int) -> Integers:
        """[M] how many of the first `samples` come from each member."""
        periods, rest = divmod(samples, self.period)
        return periods * self.counts_M + np.bincount(self.entries_P[:rest], minlength=len(self.counts_M))


def _integer_shares(shares_M: npt.NDArray[np.float64]) -> Integers:
    """[M] positive integers with sum P <= LONGEST in these proportions, as near as any; P as small as that allows."""
    best: Integers | None = None
    least = np.inf
    for period in range(len(shares_M), LONGEST + 1):
        exact_M = shares_M * period
        counts_M = np.floor(exact_M).astype(np.int64)
        missing = period - int(counts_M.sum())
        # The largest remainders are rounded up; a stable sort, so that ties are the same everywhere.
        counts_M[np.argsort(counts_M - exact_M, kind="stable")[:missing]] += 1
        error = float(np.abs(counts_M / period - shares_M).max())
        if counts_M.min() >= 1 and error < least - 1e-12:
            best, least = counts_M, error
        if least < 1e-12:
            break
    if best is None:
        raise ValueError(
            f"the smallest share of the blend is {shares_M.min():.2g} of the samples; shares below about "
            f"1 in {2 * LONGEST} are not supported: leave that member out or give it a larger weight"
        )
    return best


def _spread(counts_M: Integers) -> Integers:
    """[P] members in an order in which each is less than one entry away from its share, in every beginning.

    (Tijdeman, "The chairman assignment problem", 1980: among the members that are owed enough, the one whose next entry
    is due first; the distance stays within 1 - 1 / (2 M - 2).)
    """
    members, period = len(counts_M), int(counts_M.sum())
    if members == 1:
        return np.zeros(period, np.int64)
    used_M = np.zeros(members, np.int64)
    entries = np.empty(period, np.int64)
    scale = 2 * members - 2
    for place in range(period):
        # What a member is owed, in entries / (period * scale).
        owed_M = (counts_M * (place + 1) - used_M * period) * scale
        due_M = np.where(owed_M >= period, ((scale - 1) * period - owed_M) / counts_M, np.inf)
        entries[place] = member = int(due_M.argmin())
        used_M[member] += 1
    assert (used_M == counts_M).all()
    return entries


def _ordinals(entries_P: Integers, members: int) -> Integers:
    """[P] how many entries of the same member stand before each."""
    ordinals = np.empty(len(entries_P), np.int64)
    for member in range(members):
        places = np.flatnonzero(entries_P == member)
        ordinals[places] = np.arange(len(places))
    return ordinals
