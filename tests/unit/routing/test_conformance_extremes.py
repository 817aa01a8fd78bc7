"""What every registered gate owes, with its balancing: large, small and narrow numbers."""

from __future__ import annotations

import torch

from tests.unit.routing.conformance import LENGTHS, SEQUENCE, both_modes, gradients, surrogate, tokens_of


@both_modes
def test_extreme_inputs_stay_finite(case, training, make_batch):
    """Scores to both sides of what exponentials hold, and none; the declared sum of weights stands."""
    batch, gate = make_batch(LENGTHS, SEQUENCE), case.balanced(torch.float32, training=training)
    for scale in (1e4, 1e-30, 0.0):
        x_TH = (tokens_of(batch, torch.float32) * scale).requires_grad_()
        routing = gate(x_TH, batch)
        loss = surrogate(routing) + sum(term.sum for term in routing.losses.values())
        assert all(torch.isfinite(g).all() for g in gradients(gate, loss, x_TH))
        for name in ("logits_TE", "probs_TE", "weights_TE"):
            assert torch.isfinite(getattr(routing, name)).all(), name
        if gate.gate.weight_sum is not None:
            check_sum(gate.gate, routing, batch)


def check_sum(gate, routing, batch):
    """The declared sum, exactly so but for rounding; a gate that declares it may fall short where scores vanish."""
    sums_T = routing.weights_TE.sum(1)[~batch.padding_T]
    wanted_T = torch.full_like(sums_T, gate.weight_sum)
    if gate.weights_vanish:
        scores_TE = torch.sigmoid(routing.logits_TE.double()) * routing.selected_TE
        clear_T = (scores_TE.sum(1) > 1e-13)[~batch.padding_T]
        assert bool(((sums_T >= 0) & (sums_T <= wanted_T * (1 + 1e-6))).all())
        sums_T, wanted_T = sums_T[clear_T], wanted_T[clear_T]
    torch.testing.assert_close(sums_T, wanted_T)


@both_modes
def test_scores_that_are_all_far_below_zero(linear_case, training, make_batch):
    """Where exponentials or sigmoids of all experts underflow: no NaN, and the declared sum or less, as declared."""
    batch, gate = make_batch([6] * 4, SEQUENCE), linear_case.balanced(torch.float32, training=training)
    for low in (-90.0, -1e4):
        with torch.no_grad():
            gate.gate.weight.copy_(low / 16 * (1 + torch.arange(8) / 100)[:, None].expand(8, 16))
        x_TH = torch.ones(24, 16).requires_grad_()
        routing = gate(x_TH, batch)
        assert float(routing.logits_TE.detach().max()) < 0.9 * low
        loss = surrogate(routing) + sum(term.sum for term in routing.losses.values())
        assert all(torch.isfinite(g).all() for g in gradients(gate, loss, x_TH))
        assert torch.isfinite(routing.weights_TE).all()
        if gate.gate.weight_sum is not None:
            check_sum(gate.gate, routing, batch)
            assert bool((routing.weights_TE.sum(1) < 1e-6).all()) == gate.gate.weights_vanish


@both_modes
@torch.no_grad()
def test_bfloat16_inputs_and_weights_compute_in_float32(case, training, make_batch):
    """Row 29 (Megatron-LM#1421, vllm PR14027): a near-tie is resolved as float64 does, from the same bfloat16 values.
    Autocast does not change that."""
    batch = make_batch([32] * 4, 32)
    gate = case.balanced(torch.float32, training=training).to(torch.bfloat16)
    exact = case.balanced(torch.float32, training=training).to(torch.bfloat16).double()
    x_TH = tokens_of(batch, torch.bfloat16)
    routing = gate(x_TH, batch)
    assert routing.logits_TE.dtype == routing.weights_TE.dtype == torch.float32
    assert torch.equal(routing.selected_TE, exact(x_TH.double(), batch).selected_TE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(routing.logits_TE, gate(x_TH, batch).logits_TE)
