"""Random tokens for benchmarks."""

from __future__ import annotations

import torch
from geometry import Geometry

from moe_train.data.batches import Batch


def random_batch(geometry: Geometry, seed: int) -> Batch:
    """One micro-batch, always the same for a seed."""
    g = geometry
    tokens = torch.randint(0, g.vocab, (g.batch, g.sequence + 1), generator=torch.Generator().manual_seed(seed))
    shape = (g.batch, g.sequence)
    return Batch(
        ids_BS=tokens[:, :-1].contiguous(),
        labels_BS=tokens[:, 1:].contiguous(),
        target_BS=torch.ones(shape, dtype=torch.bool),
        padding_BS=torch.zeros(shape, dtype=torch.bool),
        sample_B=torch.arange(seed * g.batch, (seed + 1) * g.batch),
    )
