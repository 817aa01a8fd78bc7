from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_train.routing import BalancedGate, LossTerm
from moe_train.routing.balancing import importance_loss, move_bias, squared_cv, switch_loss, z_loss
from moe_train.routing.options import (
    BalancingOptions,
    BiasOptions,
    ImportanceLossOptions,
    RouterOptions,
    SwitchLossOptions,
)
from moe_train.routing.registry import check_options
from moe_train.routing.schedule import Ramp
from moe_train.routing.scopes import TokenSets

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


class TestImportanceLoss:
    def sets_of(self, scope, batch):
        valid = (~batch.padding_T).nonzero().flatten().tolist()
        return [[t for t in valid if t % 3 == b] for b in range(3)] if scope == "sequence" else [valid]

    @pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
    def test_equals_the_formula(self, scope, make_batch, fresh_seed):
        """Shazeer et al. 2017, eq. 6 and 7, by loops; the gradient by autograd through them."""
        batch = make_batch(LENGTHS, SEQUENCE)
        amounts_TE = torch.rand(15, EXPERTS, dtype=torch.float64).requires_grad_()
        term = importance_loss(amounts_TE, TokenSets(batch, scope), 0, 0.7)
        values = []
        for tokens in self.sets_of(scope, batch):
            importance = [sum(amounts_TE[t, e] for t in tokens) for e in range(EXPERTS)]
            mean = sum(importance) / EXPERTS
            values.append(sum((x - mean) ** 2 for x in importance) / EXPERTS / mean**2)
        want = sum(values) / len(values)
        loss = term.sum / term.count
        assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
        got, wanted = (torch.autograd.grad(x, amounts_TE, retain_graph=True)[0] for x in (loss, want))
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)
        assert term.coefficient == 0.7 and term.unit == {"sequence": "sequence", "micro_batch": "micro_batch"}.get(
            scope, "token"
        )

    @pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
    def test_zero_with_a_gradient_of_zero_at_perfect_balance(self, scope, make_batch):
        """Pitfall 8 (vmoe PR218): the root of a variance of 0 has no gradient; there is none here."""
        batch = make_batch([8, 8], 8)
        amounts_TE = torch.full((16, 8), 0.125, requires_grad=True)
        term = importance_loss(amounts_TE, TokenSets(batch, scope), 0, 1.0)
        assert float(term.sum.detach()) == 0.0
        assert not bool(torch.autograd.grad(term.sum, amounts_TE)[0].any())

    def test_cv_squared_at_perfect_balance(self):
        """Row 8 again, for the function that noisy_topk's two losses share; a set without anything has 0."""
        total_GE = torch.tensor([[0.1] * 7, [0.0] * 7, [3.0] * 7]).requires_grad_()
        value_G = squared_cv(total_GE)
        assert bool((value_G < 1e-12).all())
        value_G.sum().backward()
        assert bool((total_GE.grad.abs() < 1e-5).all())
        assert float(squared_cv(torch.tensor([[4.0, 0, 0, 0]]))) == 3.0

    @pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
    @pytest.mark.parametrize("amount", [0.0, 1e-38, 1e30])
    def test_is_finite_where_nothing_or_much_is_given(self, scope, amount, make_batch):
        amounts_TE = (torch.rand(15, EXPERTS) * amount).requires_grad_()
        term = importance_loss(amounts_TE, TokenSets(make_batch(LENGTHS, SEQUENCE), scope), 0, 1.0)
        assert bool(torch.isfinite(term.sum)) and bool(
            torch.isfinite(torch.autograd.grad(term.sum, amounts_TE)[0]).all()
        )

    def test_everything_on_one_expert(self, make_batch):
        amounts_TE = torch.zeros(15, EXPERTS)
        amounts_TE[:, 3] = 0.3
        term = importance_loss(amounts_TE, TokenSets(make_batch(LENGTHS, SEQUENCE), "sequence"), 0, 1.0)
        assert float(term.sum / term.count) == pytest.approx(EXPERTS - 1, rel=1e-6)

    @pytest.mark.parametrize("of", ["probabilities", "weights"])
    def test_of_what(self, of, make_batch):
        batch, options = make_batch(LENGTHS, SEQUENCE), ImportanceLossOptions(0.5, of=of)
        gate = BalancedGate(RouterOptions(balancing=BalancingOptions(importance_loss=options)), 4, EXPERTS)
        routing = gate(torch.randn(15, 4), batch)
        amounts_TE = routing.probs_TE if of == "probabilities" else routing.weights_TE
        want = importance_loss(amounts_TE, TokenSets(batch, "sequence"), 0, 0.5)
        assert (
            torch.equal(routing.losses["importance"].sum, want.sum) and routing.losses["importance"].coefficient == 0.5
        )

    def test_probabilities_are_refused_where_there_are_none(self, monkeypatch):
        from moe_train.routing import SoftmaxTopKGate

        monkeypatch.setattr(SoftmaxTopKGate, "takes_switch_loss", False)
        with pytest.raises(ValueError, match="importance_loss makes no sense"):
            check_options(RouterOptions(balancing=BalancingOptions(importance_loss=ImportanceLossOptions(0.1))), 8)
        weights = ImportanceLossOptions(0.1, of="weights")
        check_options(RouterOptions(balancing=BalancingOptions(importance_loss=weights)), 8)


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
