"""The selection bias: moves once per step, centred, in float32, towards equal load or a target."""

from __future__ import annotations

import pytest
import torch

from moe_train.routing import BalancedGate
from moe_train.routing.balancing import move_bias
from moe_train.routing.options import BalancingOptions, BiasOptions, RouterOptions

LENGTHS, SEQUENCE = [5, 2, 4], 5


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_bias_moves_towards_equal_load_and_is_centred(rule):
    """Row 11 (torchtitan PR1304, PR3593): no drift of the mean."""
    load_E = torch.tensor([10, 30, 20, 20, 21])
    bias_E = torch.tensor([0.5, -0.5, 0.1, 0.0, -0.1])
    mean = 101 / 5
    moved = [0.01 * ((c < mean) - (c > mean) if rule == "sign" else (mean - c) / mean) for c in load_E.tolist()]
    expected_E = bias_E.double() + torch.tensor(moved, dtype=torch.float64)
    for _ in range(3):
        move_bias(bias_E, load_E, BiasOptions(0.01, rule))
        torch.testing.assert_close(bias_E.double(), expected_E - expected_E.mean(), rtol=1e-5, atol=1e-7)
        assert abs(float(bias_E.mean())) < 1e-7
        expected_E = expected_E - expected_E.mean() + torch.tensor(moved, dtype=torch.float64)


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_a_step_without_tokens_or_with_equal_load_moves_no_bias(rule):
    for load in (0, 7, 2**40):
        bias_E = torch.tensor([0.25, -0.25])
        move_bias(bias_E, torch.tensor([load, load]), BiasOptions(0.1, rule))
        assert bias_E.tolist() == [0.25, -0.25]


def test_bias_sees_one_token_in_more_than_2_to_the_24():
    """Row 10 (Megatron-LM PR7081): counts beyond float32's integers still decide the sign."""
    for base in (40840, 2**24, 2**40):
        bias_E = torch.zeros(2)
        move_bias(bias_E, torch.tensor([base + 1, base]), BiasOptions(0.5))
        assert bias_E.tolist() == [-0.5, 0.5]


class TestTargetLoad:
    @pytest.mark.parametrize("rule", ["sign", "proportional"])
    def test_moves_towards_the_shares_and_is_centred(self, rule):
        """Row 11: one move, and no drift of the mean."""
        target, load = [0.4, 0.3, 0.1, 0.1, 0.1], [50, 20, 10, 9, 11]
        bias_E = torch.tensor([0.5, -0.5, 0.1, 0.0, -0.1])
        lacks = [100 * share - count for share, count in zip(target, load, strict=True)]
        moved = [0.01 * (((x > 1e-9) - (x < -1e-9)) if rule == "sign" else x / 20) for x in lacks]
        expected_E = bias_E.double() + torch.tensor(moved, dtype=torch.float64)
        move_bias(bias_E, torch.tensor(load), BiasOptions(0.01, rule, target))
        torch.testing.assert_close(bias_E.double(), expected_E - expected_E.mean(), rtol=1e-5, atol=1e-7)
        assert abs(float(bias_E.mean())) < 1e-7

    @pytest.mark.parametrize("rule", ["sign", "proportional"])
    def test_a_load_as_wanted_or_a_step_without_tokens_moves_nothing(self, rule):
        for unit in (0, 1, 7, 2**40 + 1):
            bias_E = torch.tensor([0.25, 0.0, -0.25])
            move_bias(bias_E, torch.tensor([3, 2, 1]) * unit, BiasOptions(0.1, rule, [3.0, 2.0, 1.0]))
            assert bias_E.tolist() == [0.25, 0.0, -0.25]

    def test_one_slot_among_many_decides_the_sign(self):
        """Row 10 (Megatron-LM PR7081)."""
        for base in (2**24, 2**40):
            bias_E = torch.zeros(2)
            move_bias(bias_E, torch.tensor([3 * base + 1, base]), BiasOptions(0.5, "sign", [3.0, 1.0]))
            assert bias_E.tolist() == [-0.5, 0.5]

    @pytest.mark.parametrize("rule", ["sign", "proportional"])
    @pytest.mark.parametrize("share", [1.0, 0.125, 40.0])
    def test_equal_shares_are_no_target(self, rule, share):
        load_E, with_target_E, without_E = torch.randint(0, 1000, (8,)), torch.zeros(8), torch.zeros(8)
        move_bias(with_target_E, load_E, BiasOptions(0.01, rule, [share] * 8))
        move_bias(without_E, load_E, BiasOptions(0.01, rule))
        torch.testing.assert_close(with_target_E, without_E, rtol=1e-6, atol=1e-9)

    def test_is_passed_on_by_the_gate(self):
        options = BiasOptions(0.1, target_load=[3.0, 3.0, 1.0, 1.0, 1.0, 1.0])
        gate = BalancedGate(RouterOptions(balancing=BalancingOptions(bias=options)), 4, 6)
        gate.after_step({"load": torch.tensor([20, 20, 20, 9, 9, 12])})
        assert gate.bias_E.tolist() == pytest.approx([0.1, 0.1, -0.1, 0.0, 0.0, -0.1], abs=1e-6)


def test_bias_stays_float32():
    """Row 9 (Megatron-LM#1482, prime-rl PR3411): after a cast of the module, and with full precision kept."""
    gate = BalancedGate(RouterOptions(balancing=BalancingOptions(bias=BiasOptions(1e-3))), 4, 6)
    gate.bias_E += 1.0 + 2**-20
    before = gate.bias_E.clone()
    outer = torch.nn.Sequential(gate).bfloat16()
    assert gate.gate.weight.dtype == torch.bfloat16
    assert gate.bias_E.dtype == torch.float32 and torch.equal(gate.bias_E, before)
    assert "0.bias_E" in outer.state_dict()
    other = BalancedGate(gate.options, 4, 6).bfloat16()
    other.load_state_dict(gate.state_dict())
    assert other.bias_E.dtype == torch.float32 and torch.equal(other.bias_E, before)


def test_bias_moves_in_after_step_only(make_batch):
    """Row 11: neither the forward pass nor a recomputation nor evaluation moves it; one call, one step."""
    gate = BalancedGate(RouterOptions(balancing=BalancingOptions(bias=BiasOptions(0.1))), 4, 6)
    batch = make_batch(LENGTHS, SEQUENCE)
    routing = gate(torch.randn(15, 4), batch)
    gate.eval()(torch.randn(15, 4), batch, replay_TE=routing.selected_TE)
    assert not bool(gate.bias_E.any())
    gate.after_step({"load": torch.tensor([6, 0, 3, 3, 3, 3])})
    assert gate.bias_E.tolist() == pytest.approx([-0.1, 0.1, 0.0, 0.0, 0.0, 0.0], abs=1e-6)


def test_bias_balances_a_skewed_router(make_batch):
    batch = make_batch([64, 64], 64)
    router = RouterOptions(options={"top_k": 2}, balancing=BalancingOptions(bias=BiasOptions(0.05)))
    gate = BalancedGate(router, 8, 8)
    torch.nn.init.normal_(gate.gate.weight)
    x_TH = torch.randn(128, 8) + 1.0
    first = gate(x_TH, batch).sums["load"]
    for _ in range(200):
        gate.after_step(gate(x_TH, batch).sums)
    last = gate(x_TH, batch).sums["load"]
    assert int(last.max() - last.min()) < int(first.max() - first.min()) / 2


def test_no_bias_no_buffer():
    assert BalancedGate(RouterOptions(), 4, 6).bias_E is None
    assert "bias_E" not in BalancedGate(RouterOptions(), 4, 6).state_dict()
