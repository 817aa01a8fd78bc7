"""Values that change over the run."""

from __future__ import annotations

import pytest
import torch

from moe_train.routing.schedule import Ramp, bounds, value_at


def test_a_number_stays():
    assert value_at(0.3, 7) == 0.3 and bounds(0.3) == (0.3, 0.3)


@pytest.mark.parametrize(
    ("step", "linear", "cosine"), [(0, 2, 2), (10, 2, 2), (15, 1.5, 1.7071), (20, 1, 1), (30, 0, 0), (99, 0, 0)]
)
def test_ramp(step, linear, cosine):
    for shape, value in (("linear", linear), ("cosine", cosine)):
        ramp = Ramp(start=2, end=0, steps=20, first_step=10, shape=shape)
        assert value_at(ramp, step) == pytest.approx(value, abs=1e-4)
        assert float(ramp.at(torch.tensor(step))) == value_at(ramp, step)
        assert bounds(ramp) == (0, 2)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"first_step": -1}, {"end": float("nan")}, {"start": float("inf")}])
def test_ramps_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match="ramp"):
        Ramp(**wrong)
