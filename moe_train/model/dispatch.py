"""Permutes tokens into rows sorted by expert and back, on one rank (EP = 1), without a host synchronisation where the
gate has a static bound on experts per token.

Suffixes: T tokens, H hidden, E experts, K slots per token, R rows = T * K, sorted by expert. A slot without an expert
sorts to the end, beyond the rows that any expert owns; such a row is never read back, because the grouped kernel
leaves garbage in it, forward and backward. With a padded permutation (capacity) R is E * rows + 1: every expert owns
equally many rows, those without a slot hold zeros, and the one behind them is for the slots without an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.routing.interface import Routing


@dataclass(frozen=True)
class Permutation:
    """Which row belongs to which slot."""

    token_R: Tensor
    """Token of each row; T in a row of zeros."""
    row_TK: Tensor
    """Row of each slot."""
    used_TK: Tensor
    """Whether the slot holds an expert."""
    order_R: Tensor
    """Flat slot (t * K + k) of each row; T * K in a row of zeros."""
    expert_TK: Tensor
    """Expert of each slot, 0 in an unused one."""
    counts_E: Tensor
    """Rows of each expert."""
    padded: bool = False
    """Whether there are rows of zeros."""

    def rows_of(self, x_NH: Tensor, index_R: Tensor) -> Tensor:
        """x_NH[index], [R, ...], with zeros where the index is N."""
        if not self.padded:
            return x_NH.index_select(0, index_R)
        zero_R = index_R == x_NH.shape[0]
        rows_RH = x_NH.index_select(0, index_R.masked_fill(zero_R, 0))
        return rows_RH.masked_fill(zero_R.view(-1, *[1] * (x_NH.dim() - 1)), 0.0)


def make_permutation(routing: Routing, padded_rows: int | None = None) -> Permutation:
    """From the kept choices of a gate. ``padded_rows``: so many rows for every expert, at least as many as the busiest
    one has."""
    if padded_rows is not None:
        return _padded_permutation(routing, padded_rows)
    num_experts = routing.kept_TE.shape[1]
    experts_TK = routing.experts_TK if routing.experts_TK is not None else _slots(routing.kept_TE)
    slots = experts_TK.shape[1]
    used_TK = experts_TK < num_experts
    order_R = experts_TK.flatten().argsort(stable=True)
    row_TK = torch.empty_like(order_R)
    row_TK[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    return Permutation(
        token_R=order_R.div(slots, rounding_mode="floor"),
        row_TK=row_TK.view_as(experts_TK),
        used_TK=used_TK,
        order_R=order_R,
        expert_TK=experts_TK.masked_fill(~used_TK, 0),
        counts_E=routing.kept_TE.sum(0),
    )


def _padded_permutation(routing: Routing, rows: int) -> Permutation:
    experts_TK, kept_TE = routing.experts_TK, routing.kept_TE
    assert experts_TK is not None
    num_experts, device = kept_TE.shape[1], kept_TE.device
    used_TK = experts_TK < num_experts
    expert_TK = experts_TK.masked_fill(~used_TK, 0)
    place_TK = (kept_TE.cumsum(0) - 1).gather(1, expert_TK)
    total = num_experts * rows
    row_TK = torch.where(used_TK, expert_TK * rows + place_TK, total)
    order_R = torch.full((total + 1,), experts_TK.numel(), device=device)
    order_R[row_TK.flatten()] = torch.arange(experts_TK.numel(), device=device)
    order_R[total] = experts_TK.numel()
    return Permutation(
        token_R=order_R.div(experts_TK.shape[1], rounding_mode="floor"),
        row_TK=row_TK,
        used_TK=used_TK,
        order_R=order_R,
        expert_TK=expert_TK,
        counts_E=torch.full((num_experts,), rows, device=device),
        padded=True,
    )


def _slots(kept_TE: Tensor) -> Tensor:
    """Chosen experts in ascending order; as many slots as the busiest token needs, which is read from the device."""
    num_experts = kept_TE.shape[1]
    slots = max(1, int(kept_TE.sum(1).max())) if kept_TE.numel() else 1
    index_E = torch.arange(num_experts, device=kept_TE.device)
    return torch.where(kept_TE, index_E, num_experts).sort(dim=1).values[:, :slots]


def _sum_slots(rows_RH: Tensor, permutation: Permutation) -> Tensor:
    """sum over the used slots of each token's rows, [T, H], in slot order (deterministic on every device).

    The rows past the owned ones hold garbage, possibly NaN, and 0 * NaN is NaN: it must not be scaled away.
    """
    if rows_RH.device.type == "cpu":
        # Without an accelerator nothing waits for a number to be read: all slots used is the rule, and free.
        if bool(permutation.used_TK.all()):
            return F.embedding_bag(permutation.row_TK, rows_RH, mode="sum")
        owned = int(permutation.counts_E.sum())
        row_TK = permutation.row_TK.masked_fill(~permutation.used_TK, owned)
        return F.embedding_bag(row_TK, rows_RH, mode="sum", padding_idx=owned)
    owned_rows = permutation.counts_E.sum()
    index_R = torch.arange(rows_RH.shape[0], device=rows_RH.device)
    rows_RH = rows_RH.masked_fill((index_R >= owned_rows)[:, None], 0.0)
    return F.embedding_bag(permutation.row_TK, rows_RH, mode="sum")


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weights_TE: Tensor, permutation: Permutation) -> tuple[Tensor, Tensor]:
        ctx.permutation = permutation
        ctx.num_experts = weights_TE.shape[1]
        weights_TK = weights_TE.gather(1, permutation.expert_TK)
        p = permutation
        return p.rows_of(x_TH, p.token_R), p.rows_of(weights_TK.flatten(), p.order_R)

    @staticmethod
    def backward(ctx: Any, dx_RH: Tensor, dweights_R: Tensor) -> tuple[Tensor, Tensor, None]:
        p: Permutation = ctx.permutation
        dweights_TK = dweights_R[p.row_TK].masked_fill(~p.used_TK, 0.0)
        # Unused slots add zero to expert 0; the used ones of a token are distinct experts.
        dweights_TE = dweights_R.new_zeros(p.row_TK.shape[0], ctx.num_experts)
        return _sum_slots(dx_RH, p), dweights_TE.scatter_add_(1, p.expert_TK, dweights_TK), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RH: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _sum_slots(y_RH, permutation)

    @staticmethod
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor, None]:
        return ctx.permutation.rows_of(dy_TH, ctx.permutation.token_R), None


def permute(x_TH: Tensor, weights_TE: Tensor, permutation: Permutation) -> tuple[Tensor, Tensor]:
    """Rows [R, H] sorted by expert, and the combine weight of each row [R]."""
    return _Permute.apply(x_TH, weights_TE, permutation)


def combine(y_RH: Tensor, permutation: Permutation) -> Tensor:
    """Sum of each token's rows, [T, H]; zero for a token without experts."""
    return _Combine.apply(y_RH, permutation)
