"""What every registered gate owes, with its balancing: it changes nothing, whatever stands there."""

from __future__ import annotations

import torch

from tests.unit.routing.conformance import LENGTHS, SEQUENCE, both_modes, gradients, outputs, surrogate, tokens_of


@both_modes
def test_contents_of_padding_change_nothing(case, training, make_batch):
    """Row 5 (Megatron-LM PR2121, #1984, torchtitan PR4594, transformers#28505), bit for bit, whatever stands there:
    numbers, huge ones, and what is none, side by side."""
    batch = make_batch(LENGTHS, SEQUENCE)
    gate, valid_T = case.balanced(bias=0.1, training=training), ~batch.padding_T
    x_TH = tokens_of(batch)

    def run(fill_TH):
        y_TH = torch.where(valid_T[:, None], x_TH, fill_TH)
        routing = gate(y_TH, batch)
        if routing.expert_input_shift_TH is not None:  # experts are given no padding
            routing.expert_input_shift_TH = routing.expert_input_shift_TH.masked_fill(~valid_T[:, None], 0.0)
        loss = surrogate(routing) + sum(term.sum for term in routing.losses.values())
        assert not any(bool(w.any()) for w in (routing.weights_TE[~valid_T], routing.selected_TE[~valid_T]))
        counts = {f"count {name}": term.count for name, term in routing.losses.items()}
        sums = {f"loss {name}": term.sum for name, term in routing.losses.items()}
        learned = dict(enumerate(gradients(gate, loss) if list(gate.parameters()) else []))
        real = {name: value[valid_T] for name, value in outputs(routing).items()}
        return real | dict(routing.sums) | counts | sums | learned

    zeros = run(torch.zeros(()).double())
    assert all(torch.isfinite(value).all() for value in zeros.values())
    kinds = [100 * tokens_of(batch, seed=9), *(torch.full((24, 16), v).double() for v in (1e30, torch.nan, -torch.inf))]
    number = torch.where(batch.padding_T, batch.padding_T.cumsum(0) - 1, 0) % len(kinds)
    assert torch.equal(number[batch.padding_T], torch.arange(4)), "each of them once"
    other = run(torch.stack(kinds)[number, torch.arange(24)])
    assert zeros.keys() == other.keys()
    for name, value in zeros.items():
        assert torch.equal(value, other[name]), name


def test_padding_gets_no_gradient(learned_case, make_batch, step_loss):
    """Row 5, backward: what stands in a padding position learns nothing from auxiliary losses."""
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = learned_case.balanced()
    x_TH = tokens_of(batch).requires_grad_()
    gradient_TH = gradients(gate, step_loss([gate(x_TH, batch)]), x_TH)[-1]
    assert not bool(gradient_TH[batch.padding_T].any())
    assert bool(gradient_TH[~batch.padding_T].any())


@both_modes
def test_more_padding_changes_no_loss_and_no_count(case, training, make_batch, step_loss):
    """Row 5: longer rows of padding and a row of nothing else."""
    batch, gate = make_batch(LENGTHS, SEQUENCE), case.balanced(training=training)
    longer = make_batch([*LENGTHS, 0], SEQUENCE + 3)
    x_SBH = tokens_of(batch).view(SEQUENCE, 4, 16)
    y_SBH = torch.randn(SEQUENCE + 3, 5, 16, dtype=torch.float64)
    y_SBH[:SEQUENCE, :4] = x_SBH
    first, second = gate(x_SBH.reshape(-1, 16), batch), gate(y_SBH.reshape(-1, 16), longer)
    torch.testing.assert_close(step_loss([first]), step_loss([second]), rtol=1e-12, atol=1e-12)
    for name, value in first.sums.items():  # counts exactly
        tolerance = 1e-12 if value.is_floating_point() else 0
        torch.testing.assert_close(second.sums[name], value, rtol=tolerance, atol=tolerance)


@both_modes
def test_nothing_but_padding(case, training, make_batch):
    batch, gate = make_batch([0, 0], 3), case.balanced(training=training)
    routing = gate(tokens_of(batch), batch)
    assert all(int(value.sum()) == 0 for value in routing.sums.values())
    for name, term in routing.losses.items():
        assert float(term.sum.detach()) == 0 and int(term.count) == 0, name
    loss = surrogate(routing) + sum(term.sum for term in routing.losses.values())
    assert all(torch.isfinite(g).all() for g in gradients(gate, loss))
    assert not bool(routing.weights_TE.any())
