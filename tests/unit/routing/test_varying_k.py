"""Gates that give tokens different numbers of experts say so, and what they say of the mean holds."""

from __future__ import annotations

import pytest
import torch

from moe_train.routing import BalancedGate
from moe_train.routing.options import RouterOptions
from moe_train.routing.registry import blank_gate

LENGTHS, SEQUENCE = [6, 3, 0, 6], 6


@pytest.mark.parametrize("training", [True, False])
def test_number_of_experts(case, make_batch, training):
    """The histogram where the number varies, and exactly max_k for every token where it does not."""
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = case.balanced().train(training)
    tokens_TH = torch.randn(24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    routing = gate(tokens_TH, batch)
    numbers = routing.selected_TE.sum(1)[~batch.padding_T].tolist()
    if gate.gate.varies_k:
        found = routing.sums["k_histogram"]
        assert found.dtype == torch.int64 and found.tolist() == [numbers.count(k) for k in range(9)]
    else:
        assert "k_histogram" not in routing.sums
        assert set(numbers) == {gate.gate.max_k}


def test_a_selection_that_is_forced(make_batch):
    batch = make_batch(LENGTHS, SEQUENCE)
    options = RouterOptions("dynamic_k", {"max_k": 3}, forced_balance=True)
    found = BalancedGate(options, 16, 8)(torch.randn(24, 16), batch).sums["k_histogram"]
    assert found.tolist() == [0, 0, 0, 15, 0, 0, 0, 0, 0]


def test_what_is_said_of_the_mean(case):
    """A number that is known in advance is possible, and is the bound where nothing varies."""
    gate = case.gate
    if not gate.varies_k:
        assert gate.mean_k == gate.max_k
    elif gate.mean_k is not None:
        assert 0 < gate.mean_k <= (gate.max_k or 8)


@pytest.mark.parametrize(
    "name, options, mean_k",
    [
        ("expert_choice", {"capacity_factor": 1.25}, 1.25),
        ("relu", {"mean_k": 3}, 3),
        ("dynamic_k", {"max_k": 3}, None),
        ("gshard", {}, None),
        ("gshard", {"second": "all"}, 2),
        ("dense", {}, 8),
        ("softmax_topk", {"top_k": 3}, 3),
    ],
)
def test_mean_by_options(name, options, mean_k):
    assert blank_gate(name, options, 8).mean_k == mean_k


def test_the_mean_of_experts_that_choose_tokens(make_batch):
    """Pools of 8 tokens and 8 experts with a capacity factor of 2: 16 slots for 8 tokens, whatever the scores."""
    batch = make_batch([8, 8], 8)
    gate = BalancedGate(RouterOptions("expert_choice", {"capacity_factor": 2.0}), 16, 8)
    sums = gate(torch.randn(16, 16), batch).sums
    assert int(sums["load"].sum()) == 2 * int(sums["tokens"])
