"""Intervals over seeds against values that can be worked out by hand."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from moe_train.lab.bootstrap import COVERED, interval, paired, worth


def test_one_seed_has_no_interval_and_none_has_nothing() -> None:
    found = interval([3.5])
    assert found is not None and (found.mean, found.low, found.high) == (3.5, None, None)
    assert interval([]) is None


@pytest.mark.parametrize("values", [[1.0, 2.0], [5.0, 3.0, 4.5]])
def test_of_two_and_three_seeds_the_ends_are_the_extremes(values: list[float]) -> None:
    """The lowest resample has probability 1/4 and 1/27, both above 2.5 %."""
    found = interval(values)
    assert found is not None
    assert (found.low, found.high) == (min(values), max(values))
    assert found.mean == pytest.approx(sum(values) / len(values))


def test_equal_values_have_an_interval_without_width() -> None:
    found = interval([0.1, 0.1, 0.1, 0.1])
    assert found is not None
    assert found.low == pytest.approx(0.1, abs=1e-15) and found.high == pytest.approx(0.1, abs=1e-15)


def test_against_all_resamples_of_five() -> None:
    """5^5 resamples can be listed; the ends of the sampled interval lie between quantiles a little further apart."""
    seed = random.randrange(2**31)
    print("seed", seed)
    values = np.random.default_rng(seed).normal(size=5)
    means = np.sort([values[list(picked)].mean() for picked in itertools.product(range(5), repeat=5)])
    found = interval(values.tolist())
    assert found is not None and found.low is not None and found.high is not None
    assert np.quantile(means, 0.018) <= found.low <= np.quantile(means, 0.032)
    assert np.quantile(means, 0.968) <= found.high <= np.quantile(means, 0.982)


def test_the_same_values_give_the_same_interval() -> None:
    assert interval([1.0, 4.0, 2.0, 8.0]) == interval([1.0, 4.0, 2.0, 8.0])


def test_pairs_take_out_what_the_seeds_share() -> None:
    """Seeds differ by ten, the arms by one."""
    found = paired({1: 11.0, 2: 21.0, 3: 31.0, 9: 0.0}, {3: 30.0, 2: 20.0, 1: 10.0, 7: 5.0})
    assert found is not None
    assert (found.mean, found.low, found.high, found.values) == (1.0, 1.0, 1.0, [1.0, 1.0, 1.0])
    assert paired({1: 2.0}, {2: 1.0}) is None


def test_the_footnote_says_what_few_seeds_are_worth() -> None:
    assert "dash" in worth(1)
    for seeds in (2, 3, 4):
        assert f"{COVERED[seeds]} %" in worth(seeds) and f"{seeds} seeds" in worth(seeds)
    assert worth(20) == ""


@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_the_coverage_that_the_footnote_claims(seeds: int) -> None:
    """Simulated with a fixed generator: a check of the figures, not of chance."""
    generator = np.random.default_rng(7)
    hits = 0
    trials = 400
    for _ in range(trials):
        found = interval(generator.normal(size=seeds).tolist())
        assert found is not None and found.low is not None and found.high is not None
        hits += found.low <= 0 <= found.high
    assert abs(100 * hits / trials - COVERED[seeds]) < 6
