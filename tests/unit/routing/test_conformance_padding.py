"""What every registered gate owes, with its balancing: it changes nothing, whatever stands there."""

from __future__ import annotations

import torch

from tests.unit.routing.conformance import LENGTHS, SEQUENCE, gradients, outputs, surrogate, tokens_of


def test_contents_of_padding_change_nothing(case, make_batch):
    """Row 5 (Megatron-LM PR2121, #1984, torchtitan PR4594, transformers#28505)."""
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = case.balanced(bias=0.1)
    x_TH = tokens_of(batch)
    other_TH = torch.where(batch.padding_T[:, None], 100 * tokens_of(batch, seed=9), x_TH)
    first, second = gate(x_TH, batch), gate(other_TH, batch)
    valid_T = ~batch.padding_T
    for name, value in outputs(first).items():
        assert torch.equal(value[valid_T], outputs(second)[name][valid_T]), name
    for name, term in first.losses.items():
        torch.testing.assert_close(term.sum, second.losses[name].sum, rtol=1e-12, atol=1e-12)
        assert torch.equal(term.count, second.losses[name].count)
    assert all(torch.equal(first.sums[name], second.sums[name]) for name in first.sums)
    assert not any(bool(w.any()) for w in (first.weights_TE[~valid_T], first.selected_TE[~valid_T]))


def test_padding_gets_no_gradient(learned_case, make_batch, step_loss):
    """Row 5, backward: what stands in a padding position learns nothing from auxiliary losses."""
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = learned_case.balanced()
    x_TH = tokens_of(batch).requires_grad_()
    gradient_TH = gradients(gate, step_loss([gate(x_TH, batch)]), x_TH)[-1]
    assert not bool(gradient_TH[batch.padding_T].any())
    assert bool(gradient_TH[~batch.padding_T].any())


def test_more_padding_changes_no_loss_and_no_count(case, make_batch, step_loss):
    """Row 5: longer rows of padding and a row of nothing else."""
    batch, gate = make_batch(LENGTHS, SEQUENCE), case.balanced()
    longer = make_batch([*LENGTHS, 0], SEQUENCE + 3)
    x_SBH = tokens_of(batch).view(SEQUENCE, 4, 16)
    y_SBH = torch.randn(SEQUENCE + 3, 5, 16, dtype=torch.float64)
    y_SBH[:SEQUENCE, :4] = x_SBH
    first, second = gate(x_SBH.reshape(-1, 16), batch), gate(y_SBH.reshape(-1, 16), longer)
    torch.testing.assert_close(step_loss([first]), step_loss([second]), rtol=1e-12, atol=1e-12)
    for name, value in first.sums.items():  # counts exactly
        tolerance = 1e-12 if value.is_floating_point() else 0
        torch.testing.assert_close(second.sums[name], value, rtol=tolerance, atol=tolerance)


def test_nothing_but_padding(case, make_batch):
    batch, gate = make_batch([0, 0], 3), case.balanced()
    routing = gate(tokens_of(batch), batch)
    assert all(int(value.sum()) == 0 for value in routing.sums.values())
    for name, term in routing.losses.items():
        assert float(term.sum.detach()) == 0 and int(term.count) == 0, name
    loss = surrogate(routing) + sum(term.sum for term in routing.losses.values())
    assert all(torch.isfinite(g).all() for g in gradients(gate, loss))
    assert not bool(routing.weights_TE.any())
