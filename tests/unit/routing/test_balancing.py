from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_train.routing import BalancedGate, LossTerm
from moe_train.routing.balancing import switch_loss, z_loss
from moe_train.routing.options import (
    BalancingOptions,
    ImportanceLossOptions,
    RouterOptions,
    SwitchLossOptions,
)
from moe_train.routing.registry import check_options
from moe_train.routing.schedule import Ramp

LENGTHS, SEQUENCE, EXPERTS = [5, 2, 4], 5, 6


def slow_switch(probs_TE, selected_TE, sets):
    """E * sum f_e P_e for each set of token indices, mean over the sets, by loops."""
    values = []
    for tokens in sets:
        slots = sum(int(selected_TE[t].sum()) for t in tokens)
        value = 0.0
        for e in range(EXPERTS):
            share = sum(int(selected_TE[t, e]) for t in tokens) / slots
            value += share * sum(float(probs_TE[t, e]) for t in tokens) / len(tokens)
        values.append(EXPERTS * value)
    return sum(values) / len(values)


def load_of(selected_TE, batch):
    return selected_TE.view(batch.sequence_length, batch.batch_size, -1).sum(0)


@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
def test_switch_loss_equals_the_formula(scope, make_batch):
    """Rows 5 and 7: pads excluded; (sum, count) give what the formula says; any number of experts per token."""
    batch = make_batch(LENGTHS, SEQUENCE)
    probs_TE = torch.randn(15, EXPERTS, dtype=torch.float64).softmax(1).requires_grad_()
    selected_TE = (torch.rand(15, EXPERTS) < 0.4) & ~batch.padding_T[:, None]
    selected_TE[:, 0] |= ~batch.padding_T
    term = switch_loss(probs_TE, load_of(selected_TE, batch), batch, 0, SwitchLossOptions(0.7, scope))
    valid = (~batch.padding_T).nonzero().flatten().tolist()
    sets = [[t for t in valid if t % 3 == b] for b in range(3)] if scope == "sequence" else [valid]
    loss = term.sum / term.count
    assert float(loss.detach()) == pytest.approx(slow_switch(probs_TE.detach(), selected_TE, sets), rel=1e-12)
    assert term.coefficient == 0.7
    assert (term.unit, int(term.count)) == {
        "sequence": ("sequence", 3),
        "micro_batch": ("micro_batch", 1),
        "global_batch": ("token", 11),
    }[scope]
    gradient_TE = torch.autograd.grad(loss, probs_TE)[0]
    for tokens in sets:
        slots = int(selected_TE[tokens].sum())
        for t in tokens:
            share_E = selected_TE[tokens].sum(0).double() / slots
            torch.testing.assert_close(gradient_TE[t], EXPERTS * share_E / len(tokens) / len(sets))


@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_one_exactly_at_perfect_balance_for_every_k(scope, k, make_batch):
    """Row 6 (transformers#45120, #43688, minimind#797): normalised by k, softmax taken once."""
    batch = make_batch([8, 8], 8)
    options = {"top_k": k, "renormalize": k > 1}
    balancing = BalancingOptions(switch_loss=SwitchLossOptions(1.0, scope))
    gate = BalancedGate(RouterOptions("softmax_topk", options, balancing, forced_balance=True), 4, 8)
    torch.nn.init.zeros_(gate.gate.weight)
    routing = gate(torch.randn(16, 4), batch)
    assert routing.sums["load"].tolist() == [2 * k] * 8
    term = routing.losses["switch"]
    assert float((term.sum / term.count).detach()) == 1.0


def test_collapse_costs_the_number_of_experts(make_batch):
    batch = make_batch([8], 8)
    probs_TE = torch.zeros(8, EXPERTS)
    probs_TE[:, 2] = 1.0
    term = switch_loss(probs_TE, load_of(probs_TE > 0, batch), batch, 0, SwitchLossOptions(1.0))
    assert float(term.sum / term.count) == EXPERTS


def test_counts_are_taken_before_capacity(make_batch, monkeypatch):
    """Row 6 (Megatron-LM#1513, #1617): a drop changes ``kept`` and nothing else that is counted."""
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = BalancedGate(RouterOptions(options={"top_k": 2}, balancing=BalancingOptions(SwitchLossOptions(1.0))), 4, 6)
    x_TH = torch.randn(15, 4)
    before, forward = gate(x_TH, batch), gate.gate.forward

    def dropping(*args, **kwargs):
        routing = forward(*args, **kwargs)
        kept_TE = routing.kept_TE.clone()
        kept_TE[:7] = False
        return dataclasses.replace(routing, kept_TE=kept_TE)

    monkeypatch.setattr(gate.gate, "forward", dropping)
    after = gate(x_TH, batch)
    assert torch.equal(after.sums["load"], before.sums["load"])
    assert torch.equal(after.losses["switch"].sum, before.losses["switch"].sum)
    assert torch.equal(after.sums["kept"], after.kept_TE.sum(0))
    assert int(after.sums["kept"].sum()) < int(after.sums["load"].sum())


def test_z_loss_equals_the_formula(make_batch):
    batch = make_batch(LENGTHS, SEQUENCE)
    logits_TE = torch.randn(15, EXPERTS, dtype=torch.float64)
    term = z_loss(logits_TE, batch, 0.5)
    valid = (~batch.padding_T).nonzero().flatten().tolist()
    expected = sum(float(logits_TE[t].exp().sum().log() ** 2) for t in valid) / len(valid)
    assert float(term.sum / term.count) == pytest.approx(expected, rel=1e-12)
    assert (term.unit, term.coefficient, int(term.count)) == ("token", 0.5, 11)


def test_a_loss_with_coefficient_zero_is_not_computed(make_batch):
    gate = BalancedGate(RouterOptions(), 4, 6)
    assert not gate(torch.randn(15, 4), make_batch(LENGTHS, SEQUENCE)).losses


def test_unit_of_a_loss_is_checked():
    with pytest.raises(ValueError, match="token, sequence, micro_batch"):
        LossTerm(torch.zeros(()), torch.ones(()), "tokens", 1.0)


class TestForcedBalance:
    def test_is_refused_where_the_number_of_experts_varies(self, unbounded_case):
        with pytest.raises(ValueError, match="forced_balance"):
            unbounded_case.balanced(forced_balance=True)

    def test_is_even_and_the_same_in_every_layout(self, bounded_case, make_batch):
        gate = bounded_case.balanced(forced_balance=True)
        x_SBH = torch.randn(8, 3, 16, dtype=torch.float64)
        whole = gate(x_SBH.reshape(24, 16), make_batch([8, 8, 8], 8, samples=[4, 9, 2]))
        assert whole.sums["load"].tolist() == [3 * gate.gate.max_k] * 8
        alone = gate(x_SBH[:, 1].contiguous(), make_batch([8], 8, samples=[9]))
        assert torch.equal(whole.selected_TE.view(8, 3, 8)[:, 1], alone.selected_TE)
        assert torch.equal(whole.selected_TE, whole.weights_TE != 0)

    def test_gate_still_computes_and_learns(self, learned_bounded_case, make_batch):
        gate = learned_bounded_case.balanced(forced_balance=True)
        routing = gate(torch.randn(10, 16, dtype=torch.float64), make_batch([5, 3], 5))
        (routing.weights_TE.square().sum() + routing.losses["z"].sum).backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in gate.parameters())
        assert not bool(routing.selected_TE[make_batch([5, 3], 5).padding_T].any())


class TestSchedule:
    ramp = Ramp(start=0.0, end=0.4, steps=4, first_step=2)

    def test_the_coefficient_follows_the_step(self, make_batch):
        balancing = BalancingOptions(
            SwitchLossOptions(self.ramp), z_loss=self.ramp, importance_loss=ImportanceLossOptions(self.ramp)
        )
        gate = BalancedGate(RouterOptions(balancing=balancing), 4, EXPERTS)
        x_TH, values = torch.randn(15, 4), []
        for step, want in ((0, 0.0), (2, 0.0), (3, 0.1), (6, 0.4), (99, 0.4)):
            losses = gate(x_TH, make_batch(LENGTHS, SEQUENCE, step=step)).losses
            assert {name: term.coefficient for name, term in losses.items()} == dict.fromkeys(
                ("switch", "z", "importance"), pytest.approx(want)
            )
            values.append([float(term.sum.detach()) for term in losses.values()])
        assert all(v == values[0] for v in values), "what is logged has no coefficient in it"

    def test_a_ramp_below_zero_is_refused(self):
        for balancing in (
            BalancingOptions(z_loss=Ramp(0.1, -0.1, 5)),
            BalancingOptions(SwitchLossOptions(Ramp(-0.1, 0.1, 5))),
            BalancingOptions(importance_loss=ImportanceLossOptions(Ramp(-0.1, 0.1, 5))),
        ):
            with pytest.raises(ValueError, match="must not be negative"):
                check_options(RouterOptions(balancing=balancing), 8)

    def test_a_ramp_of_zeros_is_off(self, make_batch):
        balancing = BalancingOptions(SwitchLossOptions(Ramp(0.0, 0.0, 5)), z_loss=Ramp(0.0, 0.0, 5))
        gate = BalancedGate(RouterOptions(balancing=balancing), 4, EXPERTS)
        assert not gate(torch.randn(15, 4), make_batch(LENGTHS, SEQUENCE)).losses


def test_exact_needs_a_loss_of_that_scope():
    with pytest.raises(ValueError, match="exact is for losses of scope global_batch"):
        check_options(RouterOptions(balancing=BalancingOptions(SwitchLossOptions(0.1), exact=True)), 8)
    for router in (
        RouterOptions(balancing=BalancingOptions(SwitchLossOptions(0.1, "global_batch"), exact=True)),
        RouterOptions("lpr", {"scope": "global_batch"}, BalancingOptions(exact=True)),
    ):
        check_options(router, 8)
