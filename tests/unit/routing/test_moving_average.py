"""The meter of LPR's published code: what its tiny min-max values stand for."""

from __future__ import annotations

import statistics

import pytest
import torch

from moe_train.routing.moving_average import DECAY, move_average, moving_average_statistics


def averaged(counts, ranks=1):
    """The average over micro-batches [N, E], seen by so many ranks in turn."""
    total_E = torch.zeros(counts.shape[1], dtype=torch.float64)
    for rank in range(ranks):
        average_E = torch.zeros_like(total_E)
        for count_E in counts[rank::ranks]:
            move_average(average_E, count_E, steps=ranks)
        total_E += DECAY ** (ranks - 1 - rank) * average_E
    return total_E


@pytest.mark.parametrize(("silent", "min_max"), [(3642, 1.27e-16), (1877, 6.41e-9), (1255, 3.33e-6)])
def test_silent_micro_batches_behind_the_published_values(silent, min_max):
    """An expert whose average stood level with the other's, then got nothing, while the other goes on as before."""
    average_E = torch.tensor([10.0, 10.0], dtype=torch.float64)
    for _ in range(silent):
        move_average(average_E, torch.tensor([10, 0]))
    found = moving_average_statistics(average_E)
    assert found["min_max"] == pytest.approx(min_max, rel=4e-3)
    assert found["utilisation"] == 1.0, "it counts as used for ever"


def test_statistics_of_known_loads():
    found = moving_average_statistics(torch.tensor([3.0, 1.0, 4.0, 2.0]))
    assert found["gini"] == pytest.approx(0.25) and found["min_max"] == 0.25 and found["utilisation"] == 1
    assert found["cv"] == pytest.approx(statistics.stdev([1, 2, 3, 4]) / 2.5), "ddof 1"
    even = moving_average_statistics(torch.full((7,), 0.3, dtype=torch.float64))
    assert even == {"gini": pytest.approx(0, abs=1e-15), "min_max": 1.0, "cv": 0.0, "utilisation": 1.0}
    one = moving_average_statistics(torch.tensor([0.0, 0.0, 0.0, 2.0]))
    assert one["gini"] == pytest.approx(0.75) and one["min_max"] == 0 and one["utilisation"] == 0.25
    assert set(moving_average_statistics(torch.zeros(3)).values()) == {0.0}


def test_against_a_loop():
    counts = torch.randint(0, 50, (40, 5))
    for expert in range(5):
        h = 0.0
        for n in range(40):
            h = 0.99 * h + 0.01 * int(counts[n, expert])
        assert float(averaged(counts)[expert]) == pytest.approx(h, rel=1e-12)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_that_take_turns_find_the_same(ranks):
    counts = torch.randint(0, 50, (12, 5))
    torch.testing.assert_close(averaged(counts, ranks), averaged(counts), rtol=1e-13, atol=0)


@pytest.mark.parametrize("bad", [[], [1.0, -1.0], [float("nan")]])
def test_impossible_loads_are_refused(bad):
    with pytest.raises(ValueError, match="moving average"):
        moving_average_statistics(torch.tensor(bad))
