"""Tokens that compete, side by side."""

from __future__ import annotations

import random

import pytest
import torch

from moe_train.routing.pools import from_pools, padding_in_pools, rank_in_pool, to_pools, tokens_in_pools


@pytest.mark.parametrize("pool", ["sequence", "micro_batch"])
def test_there_and_back(pool, make_batch):
    batch = make_batch([4, 2, 0], 4)
    x_TN = torch.randn(12, 5)
    pools_PMN = to_pools(x_TN, batch, pool)
    assert pools_PMN.shape == ((3, 4, 5) if pool == "sequence" else (1, 12, 5))
    assert torch.equal(from_pools(pools_PMN, batch, pool), x_TN)
    assert tokens_in_pools(batch, pool).tolist() == ([4, 2, 0] if pool == "sequence" else [6])
    position_PM = to_pools(batch.position_T[:, None], batch, pool)[..., 0]
    assert bool((position_PM.diff(dim=1) >= 0).all()), "an earlier row at a later position"
    if pool == "sequence":
        assert torch.equal(padding_in_pools(batch, pool)[1], torch.tensor([False, False, True, True]))


def test_rank_by_definition():
    seed = random.randrange(2**31)
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 3, (3, 7, 4), generator=generator).float()
    scores[scores == -2] = -torch.inf
    padding = torch.rand(3, 7, generator=generator) < 0.3
    ranks = rank_in_pool(scores, padding)
    for p in range(3):
        for n in range(4):
            order = sorted(range(7), key=lambda m: (bool(padding[p, m]), -float(scores[p, m, n]), m))
            real = [m for m in order if not padding[p, m]]
            assert [int(ranks[p, m, n]) for m in real] == list(range(len(real)))
            assert sorted(ranks[p, :, n].tolist()) == list(range(7))
