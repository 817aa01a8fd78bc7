from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.data.blend import LONGEST, Pattern

WEIGHTS = st.lists(st.floats(1, 100, allow_nan=False), min_size=1, max_size=12)


@settings(max_examples=12, deadline=None)
@given(weights=WEIGHTS)
def test_every_beginning_has_the_shares(weights: list[float]) -> None:
    pattern, members = Pattern(weights), len(weights)
    shares = np.array(weights) / sum(weights)
    period = pattern.period
    assert period <= LONGEST and pattern.counts_M.min() >= 1
    # Rounding the weights to integers costs at most about half an entry of the longest period.
    assert np.abs(pattern.counts_M / period - shares).max() <= 1 / LONGEST
    counts = np.cumsum(pattern.entries_P[:, None] == np.arange(members), axis=0)
    exact = np.arange(1, period + 1)[:, None] * pattern.counts_M / period
    assert np.abs(counts - exact).max() < 1


@settings(max_examples=12, deadline=None)
@given(weights=WEIGHTS, far=st.integers(0, 10**12))
def test_locate_and_counts_agree_with_counting(weights: list[float], far: int) -> None:
    pattern, members = Pattern(weights), len(weights)
    before = pattern.counts_before(far)
    assert before.sum() == far
    index_N = far + np.arange(300)
    member_N, ordinal_N = pattern.locate(index_N)
    for member in range(members):
        own = ordinal_N[member_N == member]
        assert own.tolist() == list(range(before[member], before[member] + len(own)))
    assert (pattern.counts_before(far + 300) - before).tolist() == np.bincount(member_N, minlength=members).tolist()


def test_simple_weights_are_exact() -> None:
    assert Pattern([0.7, 0.3]).counts_M.tolist() == [7, 3]
    assert Pattern([2, 1, 1]).entries_P.tolist() in ([0, 1, 2, 0], [0, 1, 0, 2], [0, 2, 1, 0])
    assert Pattern([5.0]).period == 1
    assert Pattern([1e-3, 1 - 1e-3]).counts_M.tolist() == [1, 999]


@pytest.mark.parametrize("weights", [[], [0.0, 1.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        Pattern(weights)


def test_a_share_too_small_for_a_period_is_refused() -> None:
    with pytest.raises(ValueError, match="smallest share of the blend is 1e-06"):
        Pattern([1.0, 1e-6])
