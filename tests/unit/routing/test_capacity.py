"""Capacity by definition: places, order of dropping, padding, declarations."""

from __future__ import annotations

import dataclasses
import math
import random
from fractions import Fraction

import pytest
import torch

from moe_train.routing import BalancedGate, Routing, apply_capacity, blank_gate, check_options, looks_ahead
from moe_train.routing.capacity import rows_per_expert, slots_per_expert
from moe_train.routing.gates.softmax_topk import SoftmaxTopKGate
from moe_train.routing.interface import LossTerm
from moe_train.routing.options import BalancingOptions, BiasOptions, CapacityOptions, RouterOptions, SwitchLossOptions

EXPERTS = 5


def kept_slowly(routing, batch, options, factor, max_k):
    """Pool by pool, expert by expert: tokens queue, and the first C of them are kept."""
    padding, selected = batch.padding_T.tolist(), routing.selected_TE.tolist()
    size = batch.batch_size
    tokens = [t for t in range(len(padding)) if not padding[t]]
    pools = [tokens] if options.pool == "micro_batch" else [[t for t in tokens if t % size == b] for b in range(size)]
    kept = [[False] * EXPERTS for _ in padding]
    for pool in pools:
        slots = len(pool) * max_k if max_k is not None else sum(sum(selected[t]) for t in pool)
        places = min(max(options.minimum, math.ceil(Fraction(str(factor)) * slots / EXPERTS)), len(pool))
        for e in range(EXPERTS):
            queue = [t for t in pool if selected[t][e]]
            if options.drop == "probability":
                queue.sort(key=lambda t: -float(routing.probs_TE[t, e]))  # stable: the earlier of equals stays first
            for t in queue[:places]:
                kept[t][e] = True
    return torch.tensor(kept)


def random_routing(batch, k, ties=False):
    """k experts each, or any number."""
    count = batch.padding_T.numel()
    probs_TE = torch.rand(count, EXPERTS)
    if ties:
        probs_TE = (probs_TE * 3).round() / 3
    experts_TK = None
    if k is None:
        selected_TE = (torch.rand(count, EXPERTS) < 0.6) & ~batch.padding_T[:, None]
    else:
        experts_TK = torch.rand(count, EXPERTS).argsort(1)[:, :k].masked_fill(batch.padding_T[:, None], EXPERTS)
        selected_TE = torch.zeros(count, EXPERTS + 1, dtype=torch.bool).scatter(1, experts_TK, True)[:, :EXPERTS]
    weights_TE = probs_TE * selected_TE
    return Routing(probs_TE.log(), probs_TE, weights_TE, selected_TE, selected_TE, experts_TK=experts_TK)


@pytest.mark.parametrize("k", [1, 2, 3, None])
@pytest.mark.parametrize("pool", ["sequence", "micro_batch"])
@pytest.mark.parametrize("drop", ["position", "probability"])
def test_equals_brute_force(drop, pool, k, make_batch, fresh_seed):
    random.seed(fresh_seed)
    dropped = 0
    for _ in range(20):
        length = random.randint(1, 12)
        batch = make_batch([random.randint(0, length) for _ in range(random.randint(1, 4))], length)
        factor = random.choice([0.3, 0.5, 1.0, 1.1, 1.25])
        options = CapacityOptions(factor, drop=drop, pool=pool, minimum=random.randint(1, 3))
        routing = random_routing(batch, k, ties=random.random() < 0.5)
        want_TE = kept_slowly(routing, batch, options, factor, k)
        before = dataclasses.replace(routing)
        apply_capacity(routing, batch, options, factor, k)
        assert torch.equal(routing.kept_TE, want_TE)
        assert torch.equal(routing.selected_TE, before.selected_TE)
        assert torch.equal(routing.weights_TE, torch.where(want_TE, before.weights_TE, 0.0))
        if k is not None:
            for slots, kept_E, chosen in zip(routing.experts_TK.tolist(), want_TE, before.experts_TK, strict=True):
                assert sorted(e for e in slots if e != EXPERTS) == kept_E.nonzero().flatten().tolist()
                assert all(e in (EXPERTS, c) for e, c in zip(slots, chosen.tolist(), strict=True))
        dropped += int(before.selected_TE.sum() - want_TE.sum())
    assert dropped > 0


def test_the_numbers_of_system_004():
    """63 tokens, 4 experts, k = 1, at least 4 places: 20 in training (1.25), 32 in evaluation (2.0)."""
    options = CapacityOptions(1.25, 2.0, minimum=4)
    assert slots_per_expert(options, 1.25, 63, 1, 4) == 20
    assert slots_per_expert(options, 2.0, 63, 1, 4) == 32
    assert slots_per_expert(options, 1.25, 5, 1, 4) == 4
    assert slots_per_expert(options, 1.25, 3, 1, 4) == 3, "more than there are tokens"


def test_factors_are_exact():
    """1.1 * 100 / 10 is 11.000000000000002 in floating point, whose ceiling is 12."""
    assert slots_per_expert(CapacityOptions(1.1), 1.1, 100, 1, 10) == 11
    assert slots_per_expert(CapacityOptions(1.1), 1.1, 2**40, 8, 10) == -(-11 * 2**40 * 8 // 100)


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_system_004_in_a_gate(mode, make_batch):
    """All 63 tokens want the one expert: 20 or 32 are kept, the first ones; a padding token takes no place."""
    router = RouterOptions(options={"top_k": 1, "renormalize": False}, capacity=CapacityOptions(1.25, 2.0, minimum=4))
    gate = BalancedGate(router, 4, 4).train(mode == "training")
    torch.nn.init.zeros_(gate.gate.weight)
    batch = make_batch([63, 63], 64)
    routing = gate(torch.randn(128, 4), batch)
    places = 20 if mode == "training" else 32
    assert routing.sums["load"].tolist() == [126, 0, 0, 0]
    assert routing.sums["kept"].tolist() == [2 * places, 0, 0, 0]
    assert torch.equal(routing.kept_TE[:, 0], batch.position_T < places)


def test_order_of_dropping(make_batch):
    """Four tokens want expert 0, which has two places: by position the first two, by probability the best two, among
    equals the earlier ones. Second choices come in the same queue as first ones."""
    batch = make_batch([4], 4)
    probs_TE = torch.tensor([[0.3, 0.7], [0.4, 0.6], [0.9, 0.1], [0.4, 0.6]])
    everything_TE = torch.ones(4, 2, dtype=torch.bool)

    def kept(drop):
        # Expert 0 is the first choice of token 2 alone.
        experts_TK = torch.tensor([[1, 0], [1, 0], [0, 1], [1, 0]])
        routing = Routing(probs_TE.log(), probs_TE, probs_TE, everything_TE, everything_TE, experts_TK=experts_TK)
        apply_capacity(routing, batch, CapacityOptions(0.5, drop=drop), 0.5, 2)
        return routing.kept_TE[:, 0].tolist()

    assert kept("position") == [True, True, False, False]
    assert kept("probability") == [False, True, True, False]


def test_padding_never_takes_a_place(make_batch):
    """Padding in front of real tokens, with larger probabilities and the same choice."""
    batch = make_batch([4], 4)
    batch = dataclasses.replace(batch, padding_T=torch.tensor([True, True, False, False]))
    selected_TE = torch.tensor([[False, False], [False, False], [True, False], [True, False]])
    probs_TE = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.6, 0.4]])
    for drop, kept in (("position", 2), ("probability", 3)):
        routing = Routing(probs_TE, probs_TE, probs_TE * selected_TE, selected_TE, selected_TE)
        apply_capacity(routing, batch, CapacityOptions(1.0, drop=drop), 1.0, 1)
        assert routing.kept_TE.nonzero().tolist() == [[kept, 0]], "one place for two tokens and two experts"


def test_counts_and_losses_are_those_before_capacity(make_batch):
    """Pitfall 6 (Megatron-LM#1513, #1617): load, switch loss and bias see what was selected."""
    balancing = BalancingOptions(SwitchLossOptions(1.0), z_loss=0.1)
    plain = BalancedGate(RouterOptions(balancing=balancing), 4, 6)
    small = BalancedGate(RouterOptions(balancing=balancing, capacity=CapacityOptions(0.4)), 4, 6)
    small.load_state_dict(plain.state_dict())
    batch, x_TH = make_batch([5, 2, 4], 5), torch.randn(15, 4)
    one, two = plain(x_TH, batch), small(x_TH, batch)
    assert torch.equal(one.sums["load"], two.sums["load"]) and torch.equal(one.sums["load"], one.sums["kept"])
    assert all(torch.equal(one.losses[n].sum, two.losses[n].sum) for n in ("switch", "z"))
    assert int(two.sums["kept"].sum()) == int(two.kept_TE.sum()) < int(two.sums["load"].sum())
    biased = BalancedGate(
        RouterOptions(balancing=BalancingOptions(bias=BiasOptions(0.1)), capacity=CapacityOptions(0.4)), 4, 6
    )
    biased.after_step(two.sums)
    mean = float(two.sums["load"].double().mean())
    moved = torch.sign(mean - two.sums["load"].double())
    torch.testing.assert_close(biased.bias_E.double(), 0.1 * (moved - moved.mean()), rtol=0, atol=1e-7)


def test_dropped_slots_get_no_gradient(make_batch):
    router = RouterOptions(capacity=CapacityOptions(0.5))
    gate = BalancedGate(router, 4, 6).double()
    batch = make_batch([6], 6)
    routing = gate(torch.randn(6, 4, dtype=torch.float64), batch)
    lost_TE = routing.selected_TE & ~routing.kept_TE
    assert bool(lost_TE.any())
    (gradient,) = torch.autograd.grad(routing.weights_TE[lost_TE].sum(), gate.gate.weight, retain_graph=True)
    assert not bool(gradient.any())


def test_recomputation_replays_what_was_kept(make_batch):
    router = RouterOptions(capacity=CapacityOptions(0.6, drop="probability"))
    gate, batch = BalancedGate(router, 4, 6), make_batch([6, 6], 6)
    x_TH = torch.randn(12, 4)
    first = gate(x_TH, batch)
    # Other numbers, as a recomputation with other rounding has them.
    again = gate(torch.randn(12, 4), batch, replay_TE=first.selected_TE, replay_kept_TE=first.kept_TE)
    assert torch.equal(again.kept_TE, first.kept_TE) and torch.equal(again.selected_TE, first.selected_TE)
    assert torch.equal(again.weights_TE != 0, first.kept_TE)
    assert again.experts_TK is not None and int((again.experts_TK < 6).sum()) == int(first.kept_TE.sum())


@pytest.mark.parametrize("pool", ["sequence", "micro_batch"])
def test_by_position_no_later_token_matters(pool, make_batch):
    router = RouterOptions(capacity=CapacityOptions(0.7, pool=pool))
    gate, batch = BalancedGate(router, 4, 6).double(), make_batch([8, 8], 8)
    x_TH = torch.randn(16, 4, dtype=torch.float64)
    before = gate(x_TH, batch)
    assert int(before.sums["kept"].sum()) < int(before.sums["load"].sum())
    for s in range(1, 8):
        y_TH = torch.where((batch.position_T >= s)[:, None], torch.randn_like(x_TH), x_TH)
        after = gate(y_TH, batch)
        early_T = batch.position_T < s
        assert torch.equal(after.kept_TE[early_T], before.kept_TE[early_T])
        assert torch.equal(after.weights_TE[early_T], before.weights_TE[early_T])


def test_by_probability_a_later_token_takes_the_place(make_batch):
    """The declaration in the other direction."""
    batch, everything_TE = make_batch([2], 2), torch.ones(2, 1, dtype=torch.bool)
    kept = []
    for later in (0.1, 0.9):
        probs_TE = torch.tensor([[0.5], [later]])
        routing = Routing(probs_TE, probs_TE, probs_TE, everything_TE, everything_TE)
        apply_capacity(routing, batch, CapacityOptions(0.5, drop="probability"), 0.5, 1)
        kept.append(bool(routing.kept_TE[0, 0]))
    assert kept == [True, False]


def test_without_a_bound_on_k_later_tokens_make_room(make_batch):
    """Also by position: what later tokens select changes the number of places."""
    batch, kept = make_batch([4], 4), []
    for later in (False, True):
        selected_TE = torch.tensor([[True, False], [True, False], [True, False], [later, later]])
        probs_TE = torch.full((4, 2), 0.5)
        routing = Routing(probs_TE, probs_TE, probs_TE * selected_TE, selected_TE, selected_TE)
        apply_capacity(routing, batch, CapacityOptions(1.0), 1.0, None)
        kept.append(int(routing.kept_TE[:3, 0].sum()))
    assert kept == [2, 3]


def test_what_looks_ahead():
    bounded, free = blank_gate("softmax_topk", {}, 8), blank_gate("dynamic_k", {}, 8)
    assert free.max_k is None
    assert not looks_ahead(CapacityOptions(drop="probability"), free)
    assert not looks_ahead(CapacityOptions(1.0), bounded)
    assert looks_ahead(CapacityOptions(1.0), free)
    assert looks_ahead(CapacityOptions(None, 1.0, drop="probability"), bounded)


@pytest.mark.parametrize(
    ("capacity", "gate", "message"),
    [
        (CapacityOptions(0.0), "softmax_topk", "factor is 0.0"),
        (CapacityOptions(float("nan")), "softmax_topk", "factor is nan"),
        (CapacityOptions(1.0, float("inf")), "softmax_topk", "evaluation_factor is inf"),
        (CapacityOptions(1.0, minimum=0), "softmax_topk", "minimum is 0"),
        (CapacityOptions(pad=True), "softmax_topk", "pad does nothing"),
        (
            CapacityOptions(1.0, pad=True),
            "dynamic_k",
            "pad needs shapes .*: set router.options.max_k, or switch pad off",
        ),
        (CapacityOptions(1.0, pad=True), "relu", "has no bound on experts per token: switch pad off"),
        (CapacityOptions(1.0, 2.0, pool="micro_batch"), "softmax_topk", "depend on its batch size"),
    ],
)
def test_what_makes_no_sense(capacity, gate, message):
    with pytest.raises(ValueError, match=message):
        check_options(RouterOptions(gate, capacity=capacity), 8)


def test_a_gate_may_refuse(monkeypatch):
    monkeypatch.setattr(SoftmaxTopKGate, "takes_capacity", False)
    with pytest.raises(ValueError, match="capacity makes no sense for gate 'softmax_topk'"):
        check_options(RouterOptions(capacity=CapacityOptions(1.0)), 8)
    check_options(RouterOptions(), 8)


def test_padded_rows_are_known_beforehand_and_enough(make_batch):
    for lengths in ([7, 3, 0], [7, 7, 7]):
        batch = make_batch(lengths, 7)
        for pool in ("sequence", "micro_batch"):
            options = CapacityOptions(1.25, pool=pool, pad=True)
            rows = rows_per_expert(options, 2, batch, 6)
            assert rows == (3 * math.ceil(1.25 * 7 * 2 / 6) if pool == "sequence" else math.ceil(1.25 * 21 * 2 / 6))
            gate = BalancedGate(RouterOptions(capacity=options), 4, 6)
            assert gate.padded_rows(batch) == rows and gate.eval().padded_rows(batch) is None
            torch.nn.init.zeros_(gate.gate.weight)
            assert int(gate.train()(torch.randn(21, 4), batch).sums["kept"].max()) <= rows
    assert rows_per_expert(CapacityOptions(1.25), 2, make_batch([7], 7), 6) is None


def test_terms_of_losses_are_untouched(make_batch):
    """A gate's own losses are computed from what it selected, before anything is dropped."""
    gate = BalancedGate(RouterOptions("lpr", {"scope": "sequence"}, capacity=CapacityOptions(0.3)), 4, 6)
    plain = BalancedGate(RouterOptions("lpr", {"scope": "sequence"}), 4, 6)
    plain.load_state_dict(gate.state_dict())
    batch, x_TH = make_batch([6, 4], 6), torch.randn(12, 4)
    one, two = gate(x_TH, batch), plain(x_TH, batch)
    assert one.losses and all(isinstance(term, LossTerm) for term in one.losses.values())
    assert all(torch.equal(one.losses[name].sum, two.losses[name].sum) for name in two.losses)
