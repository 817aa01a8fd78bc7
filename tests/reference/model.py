"""A decoder-only transformer with experts in plain PyTorch, from a dict of global tensors.

Suffixes: B sequences, S tokens per sequence, N = B * S tokens, H hidden, A query heads, G key/value heads, D width of a
head, E experts, F width of an expert, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.gates import Decision, decide
from tests.reference.geometry import Geometry, Router

Weights = dict[str, Tensor]


def forward(
    geometry: Geometry,
    router: Router,
    weights: Weights,
    ids_BS: Tensor,
    padding_BS: Tensor,
    biases: list[Tensor] | None = None,
) -> tuple[Tensor, list[Decision]]:
    """Logits [B, S, V] over the true vocabulary, and each layer's routing decision."""
    x_BSH = weights["embedding.word_embeddings.weight"][ids_BS]
    decisions = []
    for layer in range(geometry.layers):
        own = _under(weights, f"decoder.layers.{layer}.")
        x_BSH = x_BSH + _attention(geometry, own, rms_norm(x_BSH, own["input_layernorm.weight"], geometry.norm_eps))
        normed_BSH = rms_norm(x_BSH, own["pre_mlp_layernorm.weight"], geometry.norm_eps)
        flat_NH = normed_BSH.reshape(-1, geometry.hidden)
        bias_E = None if biases is None else biases[layer]
        decision = decide(router, _under(own, "mlp.router.gate."), flat_NH, padding_BS.flatten(), bias_E)
        decisions.append(decision)
        y_NH = routed_experts(flat_NH, decision, own["mlp.experts.weight1"], own["mlp.experts.weight2"])
        if geometry.shared:
            y_NH = y_NH + swiglu(flat_NH, own["mlp.shared_experts.weight1"], own["mlp.shared_experts.weight2"])
        x_BSH = x_BSH + y_NH.view_as(x_BSH)
    x_BSH = rms_norm(x_BSH, weights["decoder.final_layernorm.weight"], geometry.norm_eps)
    head_VH = weights["embedding.word_embeddings.weight" if geometry.tied else "output_layer.weight"]
    return x_BSH @ head_VH[: geometry.vocab].T, decisions


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide / torch.sqrt((wide * wide).mean(dim=-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


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
        tokens_M = decision.selected_NE[:, expert].nonzero()[:, 0]
        out_MH = swiglu(x_NH[tokens_M], w1_EF2H[expert], w2_EHF[expert])
        weight_M1 = decision.weights_NE[tokens_M, expert, None].to(x_NH.dtype)
        y_NH = y_NH.index_add(0, tokens_M, weight_M1 * out_MH)
    return y_NH


def _attention(geometry: Geometry, weights: Weights, x_BSH: Tensor) -> Tensor:
    """Causal; the rows of linear_qkv are, for each key/value head: its query heads, its key, its value."""
    batch, length, _ = x_BSH.shape
    width, per_group = geometry.head_dim, geometry.heads // geometry.kv_heads
    qkv = (x_BSH @ weights["self_attention.linear_qkv.weight"].T).view(
        batch, length, geometry.kv_heads, per_group + 2, width
    )
    q_BSAD = qkv[:, :, :, :per_group].reshape(batch, length, geometry.heads, width)
    k_BSGD, v_BSGD = qkv[:, :, :, per_group], qkv[:, :, :, per_group + 1]
    q_BSAD = rms_norm(q_BSAD, weights["self_attention.q_layernorm.weight"], geometry.norm_eps)
    k_BSGD = rms_norm(k_BSGD, weights["self_attention.k_layernorm.weight"], geometry.norm_eps)
    q_BSAD, k_BSGD = _rotate(q_BSAD, geometry.rope_theta), _rotate(k_BSGD, geometry.rope_theta)
    future_SS = torch.ones(length, length, dtype=torch.bool).triu(1)
    heads = []
    for head in range(geometry.heads):
        q_BSD, k_BSD, v_BSD = q_BSAD[:, :, head], k_BSGD[:, :, head // per_group], v_BSGD[:, :, head // per_group]
        scores_BSS = q_BSD @ k_BSD.transpose(1, 2) / width**0.5
        scores_BSS = scores_BSS.masked_fill(future_SS, float("-inf"))
        heads.append(torch.softmax(scores_BSS, dim=-1) @ v_BSD)
    return torch.cat(heads, dim=-1) @ weights["self_attention.linear_proj.weight"].T


def _rotate(x_BSAD: Tensor, theta: float) -> Tensor:
    """Rotary embedding: element i of the first half of a head turns with element i of the second."""
    length, width = x_BSAD.shape[1], x_BSAD.shape[3]
    wide = x_BSAD.dtype if x_BSAD.dtype == torch.float64 else torch.float32
    frequency = theta ** (-torch.arange(0, width, 2, dtype=wide) / width)
    angle_S1D = (torch.arange(length, dtype=wide)[:, None] * frequency)[:, None, :]
    cos, sin = torch.cos(angle_S1D).to(x_BSAD.dtype), torch.sin(angle_S1D).to(x_BSAD.dtype)
    first, second = x_BSAD[..., : width // 2], x_BSAD[..., width // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _under(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
