"""The selection that is even by construction.

Suffixes: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.routing.interface import TokenBatch


def round_robin(batch: TokenBatch, k: int, num_experts: int) -> Tensor:
    """Selection bool [T, E] of k neighbouring experts per token that walks through the experts with the position, so
    that a sequence of length S is exactly balanced where E divides S * k. The same under every layout."""
    expert_E = torch.arange(num_experts, device=batch.position_T.device)
    start_T = batch.position_T * k + batch.sample_T
    offset_TE = torch.remainder(expert_E - start_T[:, None], num_experts)
    return (offset_TE < k) & ~batch.padding_T[:, None]
