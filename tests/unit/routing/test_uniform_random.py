from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_train.routing import UniformRandomGate, UniformRandomOptions


def chosen(gate, batch):
    return gate(torch.zeros(batch.ids_T.numel(), 4), batch).selected_TE


def test_every_pair_of_experts_is_equally_likely(make_batch, fresh_seed):
    """Chi-square over the 28 pairs of 8 experts; 27 degrees of freedom exceed 90 with probability 1e-8."""
    batch = make_batch([500] * 8, 500, seed=fresh_seed % 2**31)
    selected_TE = chosen(UniformRandomGate(4, 8), batch)
    assert bool((selected_TE.sum(1) == 2).all())
    pairs = (selected_TE.double().t() @ selected_TE.double()).triu(diagonal=1)
    expected = 4000 / 28
    assert float(((pairs[pairs > 0] - expected) ** 2 / expected).sum()) < 90
    assert int((pairs > 0).sum()) == 28


def test_the_lot_depends_on_step_layer_and_seed_and_on_nothing_else(make_batch):
    batch = make_batch([64], 64, seed=3, step=5)
    gate = UniformRandomGate(4, 8)
    first = chosen(gate, batch)
    assert torch.equal(first, gate(torch.randn(64, 4), replace(batch, ids_T=batch.ids_T + 1)).selected_TE)
    assert torch.equal(first, chosen(gate.eval(), batch))
    for other in (replace(batch, step=6), replace(batch, seed=4), replace(batch, sample_T=batch.sample_T + 1)):
        assert not torch.equal(first, chosen(gate, other))
    gate.layer = 1
    assert not torch.equal(first, chosen(gate, batch))


def test_weights_and_bad_options(make_batch):
    batch = make_batch([3, 2], 3)
    weights_TE = UniformRandomGate(4, 8, UniformRandomOptions(4))(torch.zeros(6, 4), batch).weights_TE
    assert sorted(weights_TE.unique().tolist()) == [0.0, 0.25]
    assert weights_TE.sum(1).tolist() == [0.0 if padding else 1.0 for padding in batch.padding_T.tolist()]
    with pytest.raises(ValueError, match="top_k is 0"):
        UniformRandomOptions(0)
    with pytest.raises(ValueError, match="only 2 experts"):
        UniformRandomGate(4, 2, UniformRandomOptions(3))
