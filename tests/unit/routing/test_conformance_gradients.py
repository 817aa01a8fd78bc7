"""What every registered gate owes, with its balancing: what learns, and from what."""

from __future__ import annotations

import torch

from tests.unit.routing.conformance import LENGTHS, SEQUENCE, both_modes, gradients, surrogate, tokens_of


def test_gradient_to_every_parameter(case, make_batch, step_loss):
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = case.balanced()
    routing = gate(tokens_of(batch), batch)
    names = [name for name, _ in gate.named_parameters()]
    for name, gradient in zip(names, gradients(gate, surrogate(routing) + step_loss([routing])), strict=True):
        assert torch.isfinite(gradient).all() and bool((gradient != 0).any()), name


def test_language_gradient_alone_is_not_zero(learned_case, make_batch):
    """Balancing losses must not be all that a gate learns from."""
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = learned_case.balanced()
    found = gradients(gate, surrogate(gate(tokens_of(batch), batch)))
    assert any(bool((gradient != 0).any()) for gradient in found)


def test_auxiliary_gradient_alone_is_not_zero(learned_case, make_batch, step_loss):
    """Row 1 (Automodel#1408): an auxiliary loss must have a gradient of its own."""
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = learned_case.balanced()
    assert any(bool((g != 0).any()) for g in gradients(gate, step_loss([gate(tokens_of(batch), batch)])))


def test_balancing_gradient_is_finite_at_perfect_balance(case, make_batch):
    """Row 8 (vmoe PR218): zero router, uniform logits."""
    batch, gate = make_batch(LENGTHS, SEQUENCE), case.balanced(torch.float32)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
    x_TH = tokens_of(batch, torch.float32).requires_grad_()
    routing = gate(x_TH, batch)
    for term in routing.losses.values():
        assert all(torch.isfinite(g).all() for g in gradients(gate, term.sum, x_TH))


@both_modes
def test_gradients_are_finite_where_real_tokens_have_no_expert(case, training, make_batch):
    """All tokens, or every third one: nothing is divided by what they lack, in the backward pass either."""
    batch = make_batch(LENGTHS, SEQUENCE)
    none_TE = torch.zeros(batch.padding_T.numel(), case.gate.num_experts, dtype=torch.bool)
    for dtype in (torch.float32, torch.float64):
        gate = case.balanced(dtype, training=training)
        x_TH = tokens_of(batch, dtype).requires_grad_()
        some_TE = gate(x_TH, batch).selected_TE.clone()
        some_TE[::3] = False
        for selected_TE in (none_TE, some_TE):
            routing = gate(x_TH, batch, replay_TE=selected_TE)
            assert torch.equal(routing.selected_TE, selected_TE)
            assert not bool(routing.weights_TE[~selected_TE.any(dim=1)].any())
            loss = surrogate(routing) + sum(term.sum for term in routing.losses.values())
            assert all(torch.isfinite(value).all() for value in (loss, *gradients(gate, loss, x_TH)))
