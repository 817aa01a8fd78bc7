from __future__ import annotations

import math
import random
import statistics

import pytest

from moe_train.training.guard.losses import Losses


def test_the_score_by_hand() -> None:
    """Median 3, distances 2 1 0 1 97: MAD 1."""
    losses = Losses(5, [1.0, 2.0, 3.0, 4.0, 100.0])
    assert losses.score(13.0) == pytest.approx(10.0 / 1.4826)
    assert losses.score(-7.0) == pytest.approx(-10.0 / 1.4826)
    assert losses.median() == 3.0


def test_nothing_is_judged_before_the_window_is_full() -> None:
    losses = Losses(3)
    for loss in (2.0, 2.1, 2.2):
        assert losses.score(1000.0) is None
        losses.add(loss)
    assert (losses.score(1000.0) or 0) > 1000
    losses.add(9.0)
    assert list(losses.values) == [2.1, 2.2, 9.0]


def test_a_flat_loss_has_no_spikes_of_its_last_digits() -> None:
    """The scale is at least a thousandth of the median."""
    losses = Losses(4, [2.0] * 4)
    assert losses.score(2.002) == pytest.approx(1.0)
    assert Losses(2, [0.0, 0.0]).score(0.0) == 0.0
    assert Losses(2, [0.0, 0.0]).score(1e-9) == math.inf


def test_outliers_do_not_move_the_scale() -> None:
    """Of normal noise the score is that of the standard deviation, also with a tenth of outliers."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    generator = random.Random(seed)
    values = [generator.gauss(3.0, 0.1) for _ in range(1800)] + [50.0] * 200
    score = Losses(2000, values).score(4.0)
    assert score is not None and 7.0 < score < 11.0
    assert (4.0 - statistics.mean(values)) / statistics.stdev(values) < 0
