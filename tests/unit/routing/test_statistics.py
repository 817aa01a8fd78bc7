from __future__ import annotations

import math

import pytest
import torch

from moe_train.routing import balance_statistics, gini_floor
from moe_train.routing.statistics import spread


def statistics(load, kept=None, tokens=None):
    return balance_statistics(torch.tensor(load), torch.tensor(kept or load), tokens if tokens else max(sum(load), 1))


@pytest.mark.parametrize("experts", [1, 2, 7, 128])
def test_even_counts(experts):
    found = statistics([5] * experts)
    assert found["gini"] == 0 and found["min_max"] == 1 and found["cv"] == 0 and found["dead_experts"] == 0
    assert found["entropy"] == pytest.approx(1) and found["max_violation"] == 0 and found["drop_rate"] == 0


@pytest.mark.parametrize("experts", [2, 7, 128])
def test_all_on_one(experts):
    found = statistics([0] * (experts - 1) + [9])
    assert found["gini"] == pytest.approx(1 - 1 / experts)
    assert found["min_max"] == 0 and found["entropy"] == 0 and found["dead_experts"] == experts - 1
    assert found["max_violation"] == pytest.approx(experts - 1)
    assert found["cv"] == pytest.approx(math.sqrt(experts - 1))


def test_one_two_three_four():
    found = statistics([3, 1, 4, 2], kept=[3, 1, 2, 2], tokens=5)
    assert found["gini"] == pytest.approx(0.25) and found["min_max"] == 0.25
    assert found["cv"] == pytest.approx(math.sqrt(1.25) / 2.5)
    assert found["max_violation"] == pytest.approx(0.6)
    assert found["entropy"] == pytest.approx(-sum(c / 10 * math.log(c / 10) for c in (1, 2, 3, 4)) / math.log(4))
    assert found["drop_rate"] == pytest.approx(0.2) and found["mean_k"] == 2.0


def test_gini_equals_the_mean_absolute_difference():
    load = torch.randint(0, 1000, (23,)).tolist()
    differences = sum(abs(a - b) for a in load for b in load)
    assert statistics(load)["gini"] == pytest.approx(differences / (2 * 23 * sum(load)))


def test_no_slots_give_numbers():
    found = statistics([0, 0, 0])
    assert all(math.isfinite(v) for v in found.values())
    assert found["dead_experts"] == 3 and found["mean_k"] == 0 and found.keys() == statistics([1, 2, 3]).keys()
    assert balance_statistics(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 0)["gini"] == 0


def test_counts_beyond_float32_are_exact():
    """Row 10 (Megatron-LM PR7081)."""
    found = statistics([2**40, 2**40 + 1], tokens=2**40)
    assert found["gini"] > 0 and found["max_violation"] > 0 and found["min_max"] < 1 and found["cv"] > 0
    assert statistics([2**25, 2**25 + 1], tokens=1)["gini"] == pytest.approx(1 / (2 * (2**26 + 1)), rel=1e-9)


@pytest.mark.parametrize(
    ("load", "kept", "tokens"),
    [([1, 2], [1], 3), ([1, -1], [1, -1], 3), ([1, 2], [2, 2], 3), ([1, 2], [1, 2], 0), ([], [], 0)],
)
def test_impossible_counts_are_refused(load, kept, tokens):
    with pytest.raises(ValueError):
        balance_statistics(torch.tensor(load, dtype=torch.int64), torch.tensor(kept, dtype=torch.int64), tokens)


def test_float_counts_are_refused():
    with pytest.raises(ValueError, match="integers"):
        balance_statistics(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), 3)


def test_floor_is_what_random_routing_shows():
    generator = torch.Generator().manual_seed(0)
    ginis = []
    for _ in range(20):
        load_E = torch.bincount(torch.randint(0, 64, (20000,), generator=generator), minlength=64)
        ginis.append(balance_statistics(load_E, load_E, 20000)["gini"])
    assert sum(ginis) / 20 == pytest.approx(gini_floor(20000, 64), rel=0.1)
    assert gini_floor(122880, 128) == pytest.approx(0.018, abs=5e-4)
    assert gini_floor(0, 8) == 0.0 and gini_floor(1, 8) <= 1 - 1 / 8


def test_variance_is_that_of_the_relative_load():
    load = torch.randint(1, 1000, (37,)).tolist()
    relative = [len(load) * c / sum(load) for c in load]
    expected = sum((x - 1) ** 2 for x in relative) / len(load)
    assert statistics(load)["variance"] == pytest.approx(expected, rel=1e-12)
    assert statistics(load)["cv"] ** 2 == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 61])
def test_spread_equals_torch_quantiles(layers):
    """Row 38 (Megatron-LM #2398): percentiles over layers."""
    values = torch.rand(layers, dtype=torch.float64)
    expected = torch.quantile(values, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)).tolist()
    found = spread(values.tolist())
    assert list(found) == ["min", "p25", "median", "p75", "max"]
    assert list(found.values()) == pytest.approx(expected, abs=1e-15)


def test_spread_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        spread([])
