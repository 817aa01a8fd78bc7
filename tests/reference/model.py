"""A decoder-only transformer with experts in plain PyTorch, from a dict of global tensors.

Suffixes: B sequences, S tokens per sequence, N = B * S tokens, H hidden, E experts, F width of an expert, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference.attention import attention, rms_norm
from tests.reference.capacity import drop
from tests.reference.data import Tokens
from tests.reference.gates import Decision, decide
from tests.reference.geometry import Geometry, Router

Weights = dict[str, Tensor]


@dataclass
class Forward:
    """Of one pass over a global batch."""

    logits_BSV: Tensor
    """Over the true vocabulary."""
    decisions: list[Decision]
    """Of each layer with experts, in order."""
    further_BSV: Tensor | None = None
    """Logits of multi-token prediction, for the token behind the next one."""


def forward(
    geometry: Geometry, router: Router, weights: Weights, batch: Tokens, biases: list[Tensor] | None = None
) -> Forward:
    decisions: list[Decision] = []
    length = batch.ids_BS.shape[1]
    position_BS = torch.arange(length).expand_as(batch.ids_BS) if batch.position_BS is None else batch.position_BS

    def layer(x_BSH: Tensor, own: Weights, with_experts: bool) -> Tensor:
        normed_BSH = rms_norm(x_BSH, own["input_layernorm.weight"], geometry.norm_eps)
        x_BSH = x_BSH + attention(geometry, _under(own, "self_attention."), normed_BSH, position_BS)
        flat_NH = rms_norm(x_BSH, own["pre_mlp_layernorm.weight"], geometry.norm_eps).reshape(-1, geometry.hidden)
        if not with_experts:
            return x_BSH + swiglu(flat_NH, own["mlp.weight1"], own["mlp.weight2"]).view_as(x_BSH)
        bias_E = None if biases is None else biases[len(decisions)]
        decision = decide(router, _under(own, "mlp.router.gate."), flat_NH, batch.padding_BS.flatten(), bias_E)
        if router.capacity is not None:
            decision = drop(router, decision, batch.padding_BS)
        decisions.append(decision)
        y_NH = routed_experts(flat_NH, decision, own["mlp.experts.weight1"], own["mlp.experts.weight2"])
        if geometry.shared:
            y_NH = y_NH + swiglu(flat_NH, own["mlp.shared_experts.weight1"], own["mlp.shared_experts.weight2"])
        return x_BSH + y_NH.view_as(x_BSH)

    embedding_VH = weights["embedding.word_embeddings.weight"]
    x_BSH = embedding_VH[batch.ids_BS]
    for number in range(geometry.layers):
        x_BSH = layer(x_BSH, _under(weights, f"decoder.layers.{number}."), geometry.has_experts(number))
    x_BSH = rms_norm(x_BSH, weights["decoder.final_layernorm.weight"], geometry.norm_eps)
    head_VH = (embedding_VH if geometry.tied else weights["output_layer.weight"])[: geometry.vocab]
    result = Forward(x_BSH @ head_VH.T, decisions)
    if geometry.multi_token is not None:
        own = _under(weights, "mtp.")
        next_BSH = rms_norm(embedding_VH[batch.labels_BS], own["embedding_norm.weight"], geometry.norm_eps)
        last_BSH = rms_norm(x_BSH, own["hidden_norm.weight"], geometry.norm_eps)
        z_BSH = torch.cat([next_BSH, last_BSH], dim=2) @ own["linear_proj.weight"].T
        z_BSH = layer(z_BSH, _under(own, "layer."), with_experts=True)
        result.further_BSV = rms_norm(z_BSH, own["final_layernorm.weight"], geometry.norm_eps) @ head_VH.T
    return result


def swiglu(x_NH: Tensor, w1_F2H: Tensor, w2_HF: Tensor) -> Tensor:
    """The first half of w1's rows is the gate, the second the up projection."""
    width = w2_HF.shape[1]
    gate_NF, up_NF = x_NH @ w1_F2H[:width].T, x_NH @ w1_F2H[width:].T
    return (gate_NF * torch.sigmoid(gate_NF) * up_NF) @ w2_HF.T


def routed_experts(x_NH: Tensor, decision: Decision, w1_EF2H: Tensor, w2_EHF: Tensor) -> Tensor:
    """Expert by expert over the tokens that chose it."""
    if decision.shift_NH is not None:
        x_NH = x_NH + decision.shift_NH.to(x_NH.dtype)
    y_NH = torch.zeros_like(x_NH)
    for expert in range(w1_EF2H.shape[0]):
        kept_NE = decision.selected_NE if decision.kept_NE is None else decision.kept_NE
        tokens_M = kept_NE[:, expert].nonzero()[:, 0]
        out_MH = swiglu(x_NH[tokens_M], w1_EF2H[expert], w2_EHF[expert])
        weight_M1 = decision.weights_NE[tokens_M, expert, None].to(x_NH.dtype)
        y_NH = y_NH.index_add(0, tokens_M, weight_M1 * out_MH)
    return y_NH


def _under(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
