"""What every registered gate owes, with its balancing: large, small and narrow numbers."""

from __future__ import annotations

import torch

from tests.unit.routing.conformance import LENGTHS, SEQUENCE, gradients, surrogate, tokens_of


def test_extreme_inputs_stay_finite(case, make_batch):
    batch, gate = make_batch(LENGTHS, SEQUENCE), case.balanced(torch.float32)
    for scale in (1e4, 1e-30, 0.0):
        x_TH = (tokens_of(batch, torch.float32) * scale).requires_grad_()
        routing = gate(x_TH, batch)
        loss = surrogate(routing) + sum(term.sum for term in routing.losses.values())
        assert all(torch.isfinite(g).all() for g in gradients(gate, loss, x_TH)), scale
        assert torch.isfinite(routing.weights_TE).all()


def test_bfloat16_inputs_and_weights_compute_in_float32(case, make_batch):
    """Row 29 (Megatron-LM#1421, vllm PR14027): a near-tie is resolved as float64 does, from the same bfloat16 values.
    Autocast does not change that."""
    batch = make_batch([32] * 4, 32)
    gate = case.balanced(torch.float32).to(torch.bfloat16)
    exact = case.balanced(torch.float32).to(torch.bfloat16).double()
    x_TH = tokens_of(batch, torch.bfloat16)
    routing = gate(x_TH, batch)
    assert routing.logits_TE.dtype == routing.weights_TE.dtype == torch.float32
    assert torch.equal(routing.selected_TE, exact(x_TH.double(), batch).selected_TE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(routing.logits_TE, gate(x_TH, batch).logits_TE)
