"""What every registered gate owes, with its balancing: recomputation from the selection of the first pass."""

from __future__ import annotations

import pytest
import torch

from tests.unit.routing.conformance import LENGTHS, SEQUENCE, assert_slots_agree, everything, tokens_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_is_bitwise_the_first_pass(case, dtype, make_batch):
    """Row 27 (Automodel PR2635, torchtitan#1117, NeMo-RL#1203): recomputation from the saved selection, with ties."""
    batch, gate = make_batch(LENGTHS, SEQUENCE, step=7), case.balanced(torch.float32, bias=0.1)
    x_TH = tokens_of(batch, dtype)
    x_TH[:8] = 1.0
    first = gate(x_TH, batch)
    second = gate(x_TH, batch, replay_TE=first.selected_TE.clone())
    assert everything(first).keys() == everything(second).keys()
    for name, value in everything(first).items():
        assert torch.equal(value, everything(second)[name]), name


def test_replay_is_obeyed(case, make_batch):
    """Row 27: a selection that the gate would not make now is used as it is."""
    batch, gate = make_batch(LENGTHS, SEQUENCE), case.balanced(torch.float32)
    x_TH = tokens_of(batch, torch.float32)
    replay_TE = gate(x_TH, batch).selected_TE.roll(3, dims=1)
    routing = gate(x_TH, batch, replay_TE=replay_TE)
    assert torch.equal(routing.selected_TE, replay_TE)
    assert torch.equal(routing.weights_TE != 0, replay_TE)
    assert torch.equal(routing.sums["load"], replay_TE.sum(0))
    if routing.experts_TK is not None:
        assert_slots_agree(routing)
