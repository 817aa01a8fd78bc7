"""Adds up what the micro-batches of a step say, and sums it over the data-parallel ranks in one all-reduce."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.model.micro_batch import MicroBatch
from moe_train.parallel.groups import Groups


class Collector:
    """Adds up the statistics of the micro-batches of a step; one all-reduce carries those of all layers.

    ``layers``: numbers of the MoE layers, in whose order everything stands."""

    def __init__(self, layers: list[int]) -> None:
        self.layers = layers
        self.nll_sum: Tensor | float = 0.0
        self.gradient_norm: Tensor | None = None
        self.finite = True
        """After ``reduce``: no rank's gradient norm was negative, infinite or NaN."""
        self.sums: list[dict[str, Tensor]] = [{} for _ in layers]
        self.losses: list[dict[str, Tensor]] = [{} for _ in layers]

    def add(self, nll_sum: Tensor, micro_batch: MicroBatch) -> None:
        self.nll_sum = self.nll_sum + nll_sum.double()
        for sums, losses, layer in zip(self.sums, self.losses, self.layers, strict=True):
            for name, value in micro_batch.sums[layer].items():
                _add(sums, name, value)
            for name, term in micro_batch.losses[layer].items():
                _add(losses, name, torch.stack([term.sum.double(), term.count.double()]))

    def reduce(self, groups: Groups) -> tuple[list[dict[str, Tensor]], list[dict[str, tuple[float, float]]], float]:
        """Over the data-parallel ranks. Integers travel as float64, which is exact up to 2^53."""
        norm = torch.zeros((), device=groups.device) if self.gradient_norm is None else self.gradient_norm
        bad = ~(norm.isfinite() & (norm >= 0))
        tensors = [torch.stack([torch.as_tensor(self.nll_sum, device=groups.device).double(), bad.double()])]
        tensors += [values[name] for values in self.sums for name in sorted(values)]
        tensors += [values[name] for values in self.losses for name in sorted(values)]
        flat = groups.sum_over_data(torch.cat([t.reshape(-1).double() for t in tensors]))
        parts = iter(flat.split([t.numel() for t in tensors]))
        loss_sum, bad_ranks = next(parts).tolist()
        self.finite = bad_ranks == 0
        sums = [{name: _like(next(parts), values[name]) for name in sorted(values)} for values in self.sums]
        losses: list[dict[str, tuple[float, float]]] = []
        for values in self.losses:
            pairs = {name: next(parts).tolist() for name in sorted(values)}
            losses.append({name: (pair[0], pair[1]) for name, pair in pairs.items()})
        return sums, losses, loss_sum


def _add(into: dict[str, Tensor], name: str, value: Tensor) -> None:
    into[name] = into[name] + value if name in into else value


def _like(flat: Tensor, original: Tensor) -> Tensor:
    if not original.dtype.is_floating_point:
        flat = flat.round()
    return flat.to(original.dtype).view(original.shape)
