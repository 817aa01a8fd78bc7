"""Tokens of a micro-batch divided among the ranks of tensor parallelism: Korthikanti et al. 2022 (arXiv 2205.05198).

Between the divided matrices of a layer each rank holds the positions [rank * s, (rank + 1) * s) of every sequence, with
s = S / ranks. So norms, residuals, routed experts, embedding and head work on own tokens, and the gradients of weights
that are whole on every rank add up over the ranks like those of further data-parallel ranks.

Suffixes: s positions of this rank, S all positions, B batch, N any further dimensions, T = S * B tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.model.upstream import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from moe_train.routing.interface import Routing


class SequenceParallel:
    """Over the ranks of ``group``; with one rank every function gives back what it is given."""

    def __init__(self, group: Any) -> None:
        self.group, self.ranks, self.rank = group, group.size(), group.rank()

    def own(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's positions of what is known on all ranks; positions lie along ``dim``.

        Errors: ValueError where they cannot be divided.
        """
        if self.ranks == 1:
            return x
        positions = x.shape[dim]
        if positions % self.ranks:
            raise ValueError(
                f"{positions} positions cannot be divided among {self.ranks} ranks: choose another length, or "
                "parallel.tensor=1"
            )
        size = positions // self.ranks
        return x.narrow(dim, self.rank * size, size)

    def gather(self, x_sBN: Tensor) -> Tensor:
        """[S, B, N]. The gradients of all ranks are added, and each gets those of its positions."""
        return x_sBN if self.ranks == 1 else gather_from_sequence_parallel_region(x_sBN, group=self.group)

    def scatter_sum(self, x_SBN: Tensor) -> Tensor:
        """[s, B, N]: this rank's positions of the sum over the ranks."""
        return x_SBN if self.ranks == 1 else reduce_scatter_to_sequence_parallel_region(x_SBN, group=self.group)

    def total(self, x: Tensor) -> Tensor:
        """Sum over the ranks, whose gradient each of them gets for its own summand."""
        if self.ranks == 1:
            return x
        return reduce_from_tensor_model_parallel_region(x.clone(), group=self.group)

    def join(self, x_Bs: Tensor) -> Tensor:
        """[B, S], without a gradient."""
        if self.ranks == 1:
            return x_Bs
        parts = [torch.empty_like(x_Bs, memory_format=torch.contiguous_format) for _ in range(self.ranks)]
        dist.all_gather(parts, x_Bs.detach().contiguous(), group=self.group)
        return torch.cat(parts, dim=1)

    def own_tokens(self, routing: Routing) -> Routing:
        """What the experts need to know of this rank's tokens (t = s * B + b, so that they lie side by side)."""
        if self.ranks == 1:
            return routing
        experts_TK, shift_TH = routing.experts_TK, routing.expert_input_shift_TH
        return dataclasses.replace(
            routing,
            weights_TE=self.own(routing.weights_TE),
            kept_TE=self.own(routing.kept_TE),
            experts_TK=None if experts_TK is None else self.own(experts_TK),
            expert_input_shift_TH=None if shift_TH is None else self.own(shift_TH),
        )
