"""The routing of given tokens, layer by layer: which experts, with what weights, from which logits.

Suffixes: B sequences, S tokens of a sequence, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_train.evaluation.token_ids import check_ids
from moe_train.model.micro_batch import MicroBatch, use
from moe_train.routing.interface import TokenBatch


@dataclass(frozen=True)
class LayerTrace:
    layer: int
    """Number of the layer in the model, from 0; layers without experts have no trace."""
    logits_SE: Tensor
    """float32 scores of the gate before any normalisation and without the selection bias."""
    probs_SE: Tensor
    weights_SE: Tensor
    """float32 combine weights, zero where an expert is not selected."""
    selected_SE: Tensor
    """bool; any number of experts per token."""

    def experts(self, token: int) -> list[int]:
        """The experts of a token by falling weight, among equals by rising number."""
        weight_E = self.weights_SE[token].tolist()
        return sorted(
            self.selected_SE[token].nonzero().flatten().tolist(), key=lambda expert: (-weight_E[expert], expert)
        )


@dataclass(frozen=True)
class Trace:
    """One sequence. Tensors are on the CPU."""

    ids_S: Tensor
    layers: list[LayerTrace]


def read(model: Any, ids_BS: Tensor, keep_routings: bool = False) -> tuple[Tensor, MicroBatch]:
    """Logits [B, S, V] of whole sequences, none of them padded, and what was collected on the way."""
    batch, length = ids_BS.shape
    index_SB = torch.arange(length, device=ids_BS.device)[:, None].expand(length, batch)
    tokens = TokenBatch(
        ids_T=ids_BS.t().reshape(-1),
        sample_T=torch.arange(batch, device=ids_BS.device).expand(length, batch).reshape(-1),
        position_T=index_SB.reshape(-1),
        padding_T=torch.zeros(length * batch, dtype=torch.bool, device=ids_BS.device),
        sequence_length=length,
        batch_size=batch,
    )
    micro_batch = MicroBatch(tokens=tokens, keep_routings=keep_routings)
    with torch.no_grad(), use(micro_batch):
        return model(ids_BS), micro_batch


def trace(model: Any, sequences: Sequence[Sequence[int]], device: torch.device) -> list[Trace]:
    """One trace per sequence; each is read by itself. ValueError for one without ids, or with ids that the model does
    not know."""
    check_ids(sequences, model.output_layer.vocab_size)
    found = []
    for ids in sequences:
        _, micro_batch = read(model, torch.tensor([list(ids)], device=device), keep_routings=True)
        layers = [
            LayerTrace(layer, r.logits_TE.cpu(), r.probs_TE.cpu(), r.weights_TE.cpu(), r.selected_TE.cpu())
            for layer, r in sorted(micro_batch.routings.items())
        ]
        found.append(Trace(torch.tensor(list(ids)), layers))
    return found
