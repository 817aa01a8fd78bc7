"""Selection limited to the best groups of neighbouring experts.

Suffixes: T tokens, E experts, G groups of N experts (E = G * N).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.routing.topk import mask_of, top_k


def check_group_options(num_groups: int, groups_per_token: int) -> None:
    """ValueError on groups that make no sense whatever the number of experts."""
    for name, value in (("num_groups", num_groups), ("groups_per_token", groups_per_token)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if groups_per_token > num_groups:
        raise ValueError(
            f"groups_per_token is {groups_per_token}; it must not be above num_groups, which is {num_groups}"
        )


def check_groups_fit(num_experts: int, k: int, num_groups: int, groups_per_token: int) -> None:
    """ValueError where groups do not divide the experts, or those of a token hold fewer than k."""
    if num_experts % num_groups:
        raise ValueError(f"num_groups is {num_groups}; it must divide the {num_experts} experts")
    reachable = groups_per_token * (num_experts // num_groups)
    if reachable < k:
        raise ValueError(
            f"top_k is {k}, but groups_per_token {groups_per_token} of {num_groups}"
            f" groups leaves a token {reachable} of {num_experts} experts: raise groups_per_token"
        )


def in_best_groups(ranked_TE: Tensor, num_groups: int, groups_per_token: int, best: int) -> Tensor:
    """bool [T, E], True for the experts of each token's best groups.

    The score of a group is the sum of its ``best`` largest ``ranked_TE`` (of all where it holds fewer). Ties between
    groups go to the lower index.
    """
    size = ranked_TE.shape[1] // num_groups
    ranked_TGN = ranked_TE.unflatten(1, (num_groups, size))
    best_TG = torch.topk(ranked_TGN, min(best, size), dim=-1).values.sum(dim=-1)
    return mask_of(top_k(best_TG, groups_per_token), num_groups).repeat_interleave(size, dim=1)
