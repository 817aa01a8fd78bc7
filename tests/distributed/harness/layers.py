"""One MoE layer in float64 on every rank of a pool, without an engine.

Suffixes: S sequence, B batch, H hidden, T = S * B tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.data.batches import Batch
from moe_train.model.expert_parallel import AllToAll
from moe_train.model.language_model import build_language_model
from moe_train.model.micro_batch import MicroBatch, as_root, use
from moe_train.model.moe_layer import MoELayer, moe_layers
from moe_train.model.sequence_parallel import SequenceParallel
from moe_train.model.upstream import ProcessGroupCollection
from moe_train.parallel.shard import shard_of
from moe_train.routing.interface import LossTerm, Routing, TokenBatch
from moe_train.training.step import token_batch
from tests.distributed.harness.training import Case, groups_of, joined

KINDS = ("usual", "some_tokens_without_experts", "no_token_has_experts", "one_expert", "last_experts_only", "all")


class ScriptedGate(torch.nn.Module):
    """Stands for a gate: any selection, weights that depend on the input, and one auxiliary loss."""

    def __init__(self, kind: str, hidden: int, experts: int) -> None:
        super().__init__()
        self.kind = kind
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.nn.Parameter(torch.randn(experts, hidden, generator=generator, dtype=torch.float64))

    def padded_rows(self, batch: TokenBatch) -> None:
        """As of a gate without capacity."""

    def forward(self, x_TH: Tensor, batch: TokenBatch, *, replay_TE: Tensor | None = None) -> Routing:
        logits_TE = x_TH @ self.weight.t()
        selected_TE = selection(self.kind, batch, logits_TE) & ~batch.padding_T[:, None]
        weights_TE = torch.sigmoid(logits_TE) * selected_TE
        square_TE = logits_TE.square().masked_fill(batch.padding_T[:, None], 0.0)
        term = LossTerm(square_TE.sum(), (~batch.padding_T).sum(), "token", 0.01)
        sums = {"load": selected_TE.sum(0)}
        return Routing(logits_TE, logits_TE.softmax(-1), weights_TE, selected_TE, selected_TE, {"square": term}, sums)


def selection(kind: str, batch: TokenBatch, logits_TE: Tensor) -> Tensor:
    experts = logits_TE.shape[1]
    expert_E = torch.arange(experts)
    usual_TE = logits_TE.detach() > 0
    if kind == "some_tokens_without_experts":
        return usual_TE & (batch.position_T % 3 != 0)[:, None]
    return {
        "usual": usual_TE,
        "no_token_has_experts": torch.zeros_like(usual_TE),
        "one_expert": (expert_E == 1).expand_as(usual_TE),
        "last_experts_only": usual_TE & (expert_E >= experts - 2),
        "all": torch.ones_like(usual_TE),
    }[kind]


@dataclass(frozen=True)
class LayerResult:
    """Global tensors, the rows of all ranks put together in the order of the samples."""

    y_SBH: Tensor
    dx_SBH: Tensor
    gradients: dict[str, Tensor]


def moe_layer(
    case: Case, kind: str | None, own_dispatch: bool = True, dtype: torch.dtype = torch.float64
) -> LayerResult | None:
    """Forward and backward of layer 0 of the model. ``kind`` replaces the case's gate by a scripted one.
    ``own_dispatch=False`` sends tokens through megatron-core's dispatcher also where EP is 1."""
    groups = groups_of(case)
    model = build_language_model(case.model, case.router, sequence_length=case.length, seed=case.seed).to(dtype)
    layer = moe_layers(model)[0]
    if kind is not None:
        layer.router = ScriptedGate(kind, case.model.hidden_size, case.model.moe.num_experts)  # type: ignore[assignment]
    if not own_dispatch:
        collection = ProcessGroupCollection.use_mpu_process_groups()
        layer.all_to_all = AllToAll(model.config, collection, layer.experts.first, layer.experts.num_local)
    everything = case.tokens(0)
    share = case.sequences // groups.data_size
    rows = slice(groups.data_rank * share, (groups.data_rank + 1) * share)
    t = everything.rows(rows)
    tokens = token_batch(Batch(t.ids_BS, t.labels_BS, t.target_BS, t.padding_BS, t.sample_B), groups.device)
    generator = torch.Generator().manual_seed(5)
    shape = (case.length, case.sequences, case.model.hidden_size)
    x_SBH = torch.randn(shape, generator=generator, dtype=dtype)[:, rows].clone().requires_grad_()
    dy_SBH = torch.randn(shape, generator=generator, dtype=dtype)[:, rows]
    total = (~everything.padding_BS).sum().to(dtype)
    sequences = (~everything.padding_BS).any(1).sum().to(dtype)
    micro_batch = MicroBatch(tokens=tokens, totals={"token": total, "sequence": sequences})
    sequence = SequenceParallel(groups.tensor)
    with use(micro_batch):
        y_SBH, _ = layer(sequence.own(x_SBH))
    as_root((y_SBH * sequence.own(dy_SBH)).sum(), micro_batch).backward()
    return _together(layer, y_SBH.detach(), x_SBH, groups)


def _together(layer: MoELayer, y_SBH: Tensor, x_SBH: Tensor, groups: Any) -> LayerResult | None:
    gradients = {}
    for name, parameter in layer.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, f"{name} has no gradient"
        expert = not getattr(parameter, "allreduce", True)
        gradient = parameter.grad.clone()
        if (shard := shard_of(parameter)) is not None:
            dist.all_reduce(gradient, group=groups.data)
            gradients[name] = joined(gradient, shard, groups)
            continue
        dist.all_reduce(gradient, group=groups.expert_data if expert else None)
        if expert and groups.expert_size > 1:
            parts = [torch.empty_like(gradient) for _ in range(groups.expert_size)]
            dist.all_gather(parts, gradient, group=groups.expert)
            gradient = torch.cat(parts)
        gradients[name] = gradient
    assert x_SBH.grad is not None
    dist.all_reduce(x_SBH.grad, group=groups.tensor)  # each has those of its own positions, zeros elsewhere
    every: list[Any] = [None] * groups.world_size
    dist.all_gather_object(every, (y_SBH, x_SBH.grad))
    if groups.rank:
        return None
    # Neighbours have the positions of the same samples.
    ranks = groups.tensor_size
    ys = [torch.cat([y for y, _ in every[first : first + ranks]]) for first in range(0, len(every), ranks)]
    return LayerResult(torch.cat(ys, 1), torch.cat([dx for _, dx in every[::ranks]], 1), gradients)
