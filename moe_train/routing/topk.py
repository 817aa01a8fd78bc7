"""Top-k whose ties go to the lower expert index (``torch.topk`` promises nothing about ties).

Suffixes: T tokens, E experts, K chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOWEST = -(2**63)


def check_top_k(top_k: int) -> None:
    """ValueError for a number of experts per token that no gate can choose."""
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")


def check_top_k_fits(top_k: int, num_experts: int) -> None:
    """ValueError where there are fewer experts than each token shall get."""
    if top_k > num_experts:
        raise ValueError(f"top_k is {top_k}, but there are only {num_experts} experts")


def top_k(scores_TE: Tensor, k: int, among_TE: Tensor | None = None) -> Tensor:
    """Indices of the k largest scores per row, int64 [T, K], by falling score and, among equals, rising index.

    -0.0 equals 0.0; infinities are ordinary values; NaN counts as larger (or, negative, smaller) than everything.
    ``among_TE`` (bool) puts every True before every False, whatever the scores; those follow by rising index.
    Deterministic on every device.
    """
    scores_TE = scores_TE.detach()
    if scores_TE.dtype == torch.float32:
        return _top_k_composite(scores_TE, k, among_TE)
    return top_k_reference(scores_TE, k, among_TE)


def _top_k_composite(scores_TE: Tensor, k: int, among_TE: Tensor | None) -> Tensor:
    """All keys of a row differ, so torch.topk has no freedom: the score's order in the high half, the index below."""
    experts = scores_TE.shape[1]
    bits = (scores_TE + 0.0).contiguous().view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the floats' order as signed integers
    reversed_index_E = torch.arange(experts - 1, -1, -1, device=scores_TE.device)
    key_TE = (order.to(torch.int64) << 32) | reversed_index_E
    if among_TE is not None:
        key_TE = torch.where(among_TE, key_TE, _LOWEST | reversed_index_E)
    if 2 * k >= experts:  # where sorting everything costs less
        best_TK = torch.sort(key_TE, dim=-1, descending=True).values[:, :k]
    else:
        best_TK = torch.topk(key_TE, k, dim=-1).values
    return experts - 1 - (best_TK & 0xFFFFFFFF)


def top_k_reference(scores_TE: Tensor, k: int, among_TE: Tensor | None = None) -> Tensor:
    """The same by stable sorting: slower, and right for every dtype."""
    scores_TE = scores_TE.detach()
    if among_TE is not None:
        scores_TE = scores_TE.masked_fill(~among_TE, -torch.inf)
    order_TE = torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices
    if among_TE is not None:
        first_TE = torch.gather(among_TE, 1, order_TE)
        order_TE = torch.gather(order_TE, 1, torch.sort(first_TE, dim=-1, descending=True, stable=True).indices)
    return order_TE[:, :k]


def select_top_k(scores_TE: Tensor, k: int, padding_T: Tensor, replay_TE: Tensor | None) -> tuple[Tensor, Tensor]:
    """selected_TE (bool) and experts_TK of the k largest scores, or of the selection ``replay_TE``; padding selects
    nothing, and its slots hold E."""
    experts_TK = top_k(scores_TE, k, among_TE=replay_TE)
    selected_TE = replay_TE
    if selected_TE is None:
        selected_TE = mask_of(experts_TK, scores_TE.shape[1]) & ~padding_T[:, None]
    return selected_TE, slots(experts_TK, selected_TE)


def slots(experts_TK: Tensor, selected_TE: Tensor) -> Tensor:
    """``experts_TK`` with E in the slots of experts that are not selected."""
    unused_TK = ~torch.gather(selected_TE, 1, experts_TK)
    return experts_TK.masked_fill(unused_TK, selected_TE.shape[1])


def mask_of(experts_TK: Tensor, num_experts: int) -> Tensor:
    """bool [T, E], True at the indices of each row."""
    empty_TE = torch.zeros(experts_TK.shape[0], num_experts, dtype=torch.bool, device=experts_TK.device)
    return empty_TE.scatter(1, experts_TK, True)
