"""What every registered gate owes, with its balancing: what it declares for upcycling, exports and initial values."""

from __future__ import annotations

import torch

from tests.unit.routing.conformance import LENGTHS, SEQUENCE, both_modes, tokens_of


def test_initial_values(case):
    """Drawn from the generator alone, float32 on the CPU, for names that exist."""
    gate = case.balanced().gate
    assert gate.no_decay_parameters() <= dict(gate.named_parameters()).keys()
    names = {**dict(gate.named_parameters()), **dict(gate.named_buffers())}
    for name, parameter in names.items():
        shape = tuple(parameter.shape)
        one = gate.initial(name, shape, torch.Generator().manual_seed(3))
        two = gate.initial(name, shape, torch.Generator().manual_seed(3))
        if one is not None:
            assert one.shape == shape and one.dtype == torch.float32 and torch.equal(one, two)


@torch.no_grad()
def test_declared_sum_of_weights(case, make_batch):
    batch = make_batch(LENGTHS, SEQUENCE)
    gate, valid_T = case.balanced(), ~batch.padding_T
    declared = gate.gate.weight_sum
    sums_T = torch.cat(
        [gate.train(training)(tokens_of(batch), batch).weights_TE.sum(1)[valid_T] for training in (True, False)]
    )
    if declared is None:
        assert (sums_T - sums_T[0]).abs().max() > 1e-3
    else:
        torch.testing.assert_close(sums_T, torch.full_like(sums_T, declared))


def test_experts_with_equal_rows_have_equal_scores(learned_case, make_batch):
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = learned_case.balanced()
    assert gate.gate.expert_rows
    with torch.no_grad():
        for name in gate.gate.expert_rows:
            rows = gate.gate.state_dict(keep_vars=True)[name]  # a parameter, or state
            rows[5] = rows[2]
    logits_TE = gate(tokens_of(batch), batch).logits_TE
    assert torch.equal(logits_TE[:, 5], logits_TE[:, 2])
    assert not torch.equal(logits_TE[:, 5], logits_TE[:, 3])


@both_modes
@torch.no_grad()
def test_declared_parameters_of_the_shift(case, training, make_batch):
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = case.balanced(training=training)
    assert bool(gate.gate.shift_parameters) == (gate(tokens_of(batch), batch).expert_input_shift_TH is not None)
    with torch.no_grad():
        for name in gate.gate.shift_parameters:
            gate.gate.get_parameter(name).zero_()
    shift_TH = gate(tokens_of(batch), batch).expert_input_shift_TH
    assert shift_TH is None or not shift_TH.any()
