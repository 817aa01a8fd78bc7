"""One MoE layer whose tokens do not all find a place.

Suffixes: S sequence, B batch, H hidden, T = S * B tokens, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_train.data.batches import Batch
from moe_train.model.language_model import build_language_model
from moe_train.model.micro_batch import MicroBatch, use
from moe_train.model.moe_layer import MoELayer, moe_layers
from moe_train.training.step import token_batch
from tests.distributed.harness.training import Case, groups_of


def _layer(case: Case) -> tuple[MoELayer, MicroBatch, Any]:
    groups = groups_of(case)
    model = build_language_model(case.model, case.router, sequence_length=case.length, seed=case.seed).double().train()
    share = case.sequences // groups.data_size
    t = case.tokens(0).rows(slice(groups.data_rank * share, (groups.data_rank + 1) * share))
    batch = Batch(t.ids_BS, t.labels_BS, t.target_BS, t.padding_BS, t.sample_B)
    return moe_layers(model)[0], MicroBatch(token_batch(batch, groups.device), keep_routings=True), model


def _counted(layer: MoELayer) -> list[list[int]]:
    """Fills itself with the rows that the layer's experts are given."""
    seen: list[list[int]] = []
    layer.experts.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1].tolist()))
    return seen


def rows_of_experts(case: Case) -> list[int]:
    """Of each local expert, for random tokens."""
    layer, micro_batch, _ = _layer(case)
    seen = _counted(layer)
    tokens = micro_batch.tokens
    shape = (tokens.sequence_length, tokens.batch_size, case.model.hidden_size)
    with use(micro_batch), torch.no_grad():
        layer(torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    return seen[0]


def constant_tokens(case: Case) -> tuple[Tensor, Tensor, Tensor, int | None]:
    """All tokens are alike. Output of the MoE layer, what it changes in the output of its whole transformer layer, what
    was kept, and the rows of each expert, None where they are not all the same."""
    layer, micro_batch, model = _layer(case)
    seen = _counted(layer)
    tokens = micro_batch.tokens
    x_SBH = torch.randn(case.model.hidden_size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x_SBH = x_SBH.expand(tokens.sequence_length, tokens.batch_size, -1).contiguous()
    block = model.decoder.layers[0]
    outputs = []
    with use(micro_batch), torch.no_grad():
        y_SBH, _ = layer(x_SBH)
        angles_2SB1P = model.rotary(torch.arange(tokens.sequence_length)[:, None], x_SBH.dtype)
        for scale in (1.0, 0.0):
            layer.experts.weight2.mul_(scale)
            outputs.append(block(x_SBH, None, rotary_pos_emb=angles_2SB1P)[0])
    alike = len(set(seen[0])) == 1
    return y_SBH, outputs[0] - outputs[1], micro_batch.routings[0].kept_TE, seen[0][0] if alike else None
