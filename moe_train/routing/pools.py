"""The tokens that compete with each other, side by side: those of a sequence, or all of a micro-batch.

Suffixes: T tokens (t = s * B + b), S sequence, B sequences, P pools, M tokens of a pool, N columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.routing.interface import TokenBatch
from moe_train.routing.options import Pool


def to_pools(x_TN: Tensor, batch: TokenBatch, pool: Pool) -> Tensor:
    """[P, M, N]. sequence: a pool per sequence, tokens by position. micro_batch: one pool, tokens by position and then
    by place in the micro-batch, so that an earlier row is never a later position."""
    if pool == "micro_batch":
        return x_TN[None]
    return x_TN.view(batch.sequence_length, batch.batch_size, -1).transpose(0, 1)


def from_pools(x_PMN: Tensor, batch: TokenBatch, pool: Pool) -> Tensor:
    """The inverse of ``to_pools``, [T, N]."""
    if pool == "micro_batch":
        return x_PMN[0]
    return x_PMN.transpose(0, 1).reshape(batch.sequence_length * batch.batch_size, -1)


def padding_in_pools(batch: TokenBatch, pool: Pool) -> Tensor:
    """bool [P, M], True for padding."""
    return to_pools(batch.padding_T[:, None], batch, pool)[..., 0]


def tokens_in_pools(batch: TokenBatch, pool: Pool) -> Tensor:
    """Non-padding tokens of each pool, int64 [P]."""
    return (~padding_in_pools(batch, pool)).sum(dim=1)


def rank_in_pool(scores_PMN: Tensor, padding_PM: Tensor) -> Tensor:
    """int64 [P, M, N]: place of each token among its pool's by falling score in each column, from 0; among equals the
    earlier token comes first, padding comes last."""
    scores_PMN = scores_PMN.detach().masked_fill(padding_PM[..., None], -torch.inf)
    first_PMN = torch.sort(scores_PMN, dim=1, descending=True, stable=True).indices
    # Real tokens with a score of minus infinity still come before padding.
    real_PMN = torch.gather(~padding_PM[..., None].expand_as(first_PMN), 1, first_PMN)
    again_PMN = torch.sort(real_PMN.to(torch.uint8), dim=1, descending=True, stable=True).indices
    order_PMN = torch.gather(first_PMN, 1, again_PMN)
    place_M = torch.arange(order_PMN.shape[1], device=order_PMN.device)
    return torch.empty_like(order_PMN).scatter(1, order_PMN, place_M[None, :, None].expand_as(order_PMN))
