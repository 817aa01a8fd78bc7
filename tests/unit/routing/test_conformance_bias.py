"""What every registered gate that takes a selection bias owes: it decides who is selected, and weighs nobody."""

from __future__ import annotations

import torch

from moe_train.routing import GShardGate
from tests.unit.routing.conformance import LENGTHS, SEQUENCE, both_modes, tokens_of

PAIR = [1, 6]


@both_modes
@torch.no_grad()
def test_the_bias_selects_and_does_not_weigh(biased_case, training, make_batch):
    """Row 12: a large bias on two experts gives both to every token, or one of them where there is one place; without
    the bias the same selection has the same weights, to the bit."""
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = biased_case.balanced(torch.float32, bias=0.1, training=training)
    x_TH, real_T = tokens_of(batch, torch.float32), ~batch.padding_T
    gate.bias_E[PAIR] += 50.0
    routing = gate(x_TH, batch)
    of_pair_T = routing.selected_TE[real_T][:, PAIR].sum(1)
    assert bool((of_pair_T >= (1 if gate.gate.varies_k else min(2, gate.gate.max_k))).all())
    assert bool((routing.selected_TE[real_T].sum(1) <= gate.gate.max_k).all())
    gate.bias_E.zero_()
    assert not torch.equal(gate(x_TH, batch).selected_TE, routing.selected_TE)
    again = gate(x_TH, batch, replay_TE=routing.selected_TE)
    # Its weights are shares of the two best, of which the second may have been dropped: the bias says which it was.
    same_T = routing.selected_TE.sum(1) == 2 if isinstance(gate.gate, GShardGate) else real_T
    assert bool(same_T.any()) or isinstance(gate.gate, GShardGate)
    assert torch.equal(routing.weights_TE[same_T], again.weights_TE[same_T])
