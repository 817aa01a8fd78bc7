"""What an evaluation says about routing besides the load: exact sums over the tokens of a data set, padding excluded.

Suffixes: T tokens of a batch (token t = s * B + b), L MoE layers in order, E experts, K numbers of experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_train.data.batches import Batch
from moe_train.evaluation.loss import Forward
from moe_train.evaluation.result import EvaluationResult
from moe_train.routing.interface import Gate, Routing
from moe_train.routing.moving_average import DECAY, move_average, moving_average_statistics
from moe_train.routing.scores import entropy_sum, margin_sum

MAX_PAIRS = 1 << 18
"""Numbers of all co-activation matrices together that a result holds; larger ones are left out of it."""


class RoutingDetails:
    """Adds up the routings that pass a forward function.

    gate: one like those of the model, asked what its scores mean.   rank, ranks: this one and the number of those that
    share the batches (rank r takes the batches r, r + ranks, ...).
    """

    def __init__(
        self,
        gate: Gate,
        layers: int,
        num_experts: int,
        *,
        device: torch.device | str = "cpu",
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.gate, self.rank, self.ranks = gate, rank, ranks

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.k_LK = zeros(layers, num_experts + 1)
        self.pairs_LEE = zeros(layers, num_experts, num_experts)
        self.entropy_tokens_L, self.margin_tokens_L = zeros(layers), zeros(layers)
        real = torch.float64
        self.entropy_L, self.margin_L = zeros(layers, dtype=real), zeros(layers, dtype=real)
        self.soft_LE = zeros(layers, num_experts, dtype=real)
        self.masked_LE, self.unmasked_LE = (zeros(layers, num_experts, dtype=real) for _ in range(2))

    def watch(self, forward: Forward) -> Forward:
        """The same function, whose routings are added up here on the way."""

        def watched(batch: Batch) -> tuple[Tensor, list[Routing]]:
            nll_BS, routings = forward(batch)
            self.add(batch, routings)
            return nll_BS, routings

        return watched

    @torch.no_grad()
    def add(self, batch: Batch, routings: Sequence[Routing]) -> None:
        """Adds one batch of this rank."""
        device = self.k_LK.device
        real_BS = ~batch.padding_BS
        real_T = real_BS.t().reshape(-1).to(device)
        # Rows that only fill up the batch of a rank are no padding of the data.
        filler_T = (batch.sample_B < 0).expand(real_BS.t().shape).reshape(-1).to(device)
        for layer, routing in enumerate(routings):
            selected_TE = routing.selected_TE.to(device) & real_T[:, None]
            number_T = selected_TE.sum(1)[real_T]
            self.k_LK[layer] += torch.bincount(number_T, minlength=self.k_LK.shape[1])
            chosen_TE = selected_TE.float()
            assert len(chosen_TE) < 1 << 24, "float32 counts are exact below 2^24"
            self.pairs_LEE[layer] += (chosen_TE.t() @ chosen_TE).round().long()
            weights_TE = routing.weights_TE.to(device, torch.float64)
            self.soft_LE[layer] += weights_TE.masked_fill(~selected_TE, 0.0).sum(0)
            if self.gate.reads_hidden:
                total, tokens = entropy_sum(routing.probs_TE.to(device), real_T)
                self.entropy_L[layer] += total
                self.entropy_tokens_L[layer] += tokens
                total, tokens = margin_sum(routing.logits_TE.to(device), selected_TE, real_T)
                self.margin_L[layer] += total
                self.margin_tokens_L[layer] += tokens
            load_E = selected_TE.sum(0)
            move_average(self.masked_LE[layer], load_E, steps=self.ranks)
            if self._pads_are_known:
                pads_TE = routing.logits_TE.to(device)[~real_T & ~filler_T]
                assert self.gate.max_k is not None
                pad_slots_N = pads_TE.topk(self.gate.max_k, dim=-1).indices.reshape(-1)
                load_E = load_E + torch.bincount(pad_slots_N, minlength=len(load_E))
            move_average(self.unmasked_LE[layer], load_E, steps=self.ranks)

    @property
    def _pads_are_known(self) -> bool:
        """Padding chooses no expert here; the published meter counted it, by its k largest logits."""
        return self.gate.max_k is not None and self.gate.takes_z_loss

    def add_to(self, result: EvaluationResult, reduce: Callable[[Tensor], Tensor]) -> EvaluationResult:
        """The result with these facts in its layers. ``reduce`` sums a tensor over the ranks; every rank must call."""
        to_end = DECAY ** (self.ranks - 1 - self.rank)
        self.masked_LE *= to_end
        self.unmasked_LE *= to_end
        counts = [self.k_LK, self.pairs_LEE, self.entropy_tokens_L, self.margin_tokens_L]
        sums = [self.entropy_L, self.margin_L, self.soft_LE, self.masked_LE, self.unmasked_LE]
        k_LK, pairs_LEE, entropy_tokens_L, margin_tokens_L = _reduced(counts, reduce)
        entropy_L, margin_L, soft_LE, masked_LE, unmasked_LE = _reduced(sums, reduce)
        layers = []
        for i, layer in enumerate(result.layers):
            more: dict[str, Any] = {
                "router_entropy": _mean(entropy_L[i], entropy_tokens_L[i]),
                "router_margin": _mean(margin_L[i], margin_tokens_L[i]),
                "k_histogram": _trimmed(k_LK[i].tolist()),
                "soft_load": soft_LE[i].tolist(),
                "coactivation": pairs_LEE[i].tolist() if pairs_LEE.numel() <= MAX_PAIRS else None,
                "moving_average_of_lpr": {
                    "masked": moving_average_statistics(masked_LE[i]),
                    "unmasked": moving_average_statistics(unmasked_LE[i]) if self._pads_are_known else None,
                },
            }
            layers.append(replace(layer, more={**layer.more, **more}))
        return replace(result, layers=layers)


def _reduced(tensors: list[Tensor], reduce: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """All in one reduction, on the CPU."""
    flat = reduce(torch.cat([t.reshape(-1) for t in tensors])).cpu()
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def _mean(total: Tensor, tokens: Tensor) -> float | None:
    return float(total) / int(tokens) if int(tokens) else None


def _trimmed(counts: list[int]) -> list[int]:
    """Without the zeros at the end."""
    while len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    return counts
