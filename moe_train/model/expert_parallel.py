"""Dispatch to experts on other ranks (EP > 1) through megatron-core's all-to-all token dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_train.model.experts.module import Experts
from moe_train.model.upstream import MoEAlltoAllTokenDispatcher
from moe_train.parallel.device import use_cuda


class Dispatcher(MoEAlltoAllTokenDispatcher):
    """Upstream's dispatcher; where ``padded_rows`` is set, each rank sends exactly so many rows to every expert.

    Upstream fills up with other tokens, whose combine weight is zero, and needs no number of the device then. Its own
    capacity knows neither sequences nor padding.
    """

    padded_rows: int | None = None

    def preprocess(self, routing_map: Tensor) -> Tensor:
        self.drop_and_pad = self.padded_rows is not None
        if self.padded_rows is None:
            return super().preprocess(routing_map)
        self.capacity = self.padded_rows
        self.num_out_tokens = self.capacity * self.num_experts
        self.input_splits = self.output_splits = None
        return torch.full((self.num_local_experts,), self.capacity * self.ep_size)


class HostAlltoAllDispatcher(Dispatcher):
    """Upstream's dispatcher without CUDA streams; gloo wants the split sizes on the host."""

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Any:
        if point == "before_permutation_1":
            for name in ("input_splits", "output_splits", "output_splits_tp"):
                value = getattr(self, name)
                if torch.is_tensor(value):
                    setattr(self, name, value.numpy())
        return tokens_per_expert


class AllToAll:
    """Sends each kept (token, expert) pair to the rank of the expert and brings the result back."""

    def __init__(self, config: Any, pg_collection: Any, first: int, num_local: int) -> None:
        dispatcher = Dispatcher if use_cuda() else HostAlltoAllDispatcher
        self.dispatcher = dispatcher(num_local, list(range(first, first + num_local)), config, pg_collection)

    def __call__(
        self, x_TH: Tensor, weights_TE: Tensor, kept_TE: Tensor, experts: Experts, padded_rows: int | None = None
    ) -> Tensor:
        """Weighted sum of the chosen experts' outputs, [T, H]. ``padded_rows``: so many rows from this rank for every
        expert, at least as many as it gives to the busiest one."""
        d = self.dispatcher
        d.padded_rows = padded_rows
        x, weights = d.dispatch_preprocess(x_TH, kept_TE, weights_TE)
        x, weights = d.token_dispatch(x, weights)
        x, counts, weights = d.dispatch_postprocess(x, weights)
        y = experts(x, counts, weights)
        y = d.combine_preprocess(y)
        y = d.token_combine(y)
        return d.combine_postprocess(y)
