"""Causal attention, head by head: with grouped key/value heads, and latent.

Suffixes: B sequences, S tokens per sequence, H hidden, A query heads, G key/value heads, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.reference.geometry import Geometry
from tests.reference.rotary import rotate, score_factor

Weights = dict[str, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide / torch.sqrt((wide * wide).mean(dim=-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


def attention(geometry: Geometry, weights: Weights, x_BSH: Tensor, position_BS: Tensor) -> Tensor:
    """``position_BS``: offsets in the texts, of which none sees another; each begins with 0."""
    function = _grouped if geometry.latent is None else _latent
    return function(geometry, weights, x_BSH, position_BS)


def _grouped(geometry: Geometry, weights: Weights, x_BSH: Tensor, position_BS: Tensor) -> Tensor:
    """The rows of linear_qkv are, for each key/value head: its query heads, its key, its value."""
    batch, length, _ = x_BSH.shape
    width, per_group = geometry.head_dim, geometry.heads // geometry.kv_heads
    qkv = (x_BSH @ weights["linear_qkv.weight"].T).view(batch, length, geometry.kv_heads, per_group + 2, width)
    q_BSAD = qkv[:, :, :, :per_group].reshape(batch, length, geometry.heads, width)
    k_BSGD, v_BSGD = qkv[:, :, :, per_group], qkv[:, :, :, per_group + 1]
    if geometry.query_key_norm == "all":
        q_BSAD, k_BSGD = (
            rms_norm(x.flatten(2), weights[f"{name}_layernorm.weight"], geometry.norm_eps).view_as(x)
            for name, x in (("q", q_BSAD), ("k", k_BSGD.contiguous()))
        )
    if geometry.clip is not None:
        q_BSAD, k_BSGD, v_BSGD = (
            torch.minimum(torch.maximum(x, torch.tensor(-geometry.clip)), torch.tensor(geometry.clip))
            for x in (q_BSAD, k_BSGD, v_BSGD)
        )
    if geometry.query_key_norm == "head":
        q_BSAD = rms_norm(q_BSAD, weights["q_layernorm.weight"], geometry.norm_eps)
        k_BSGD = rms_norm(k_BSGD, weights["k_layernorm.weight"], geometry.norm_eps)
    turn: Any = (position_BS, geometry.rope_theta, geometry.scaling, False)
    q_BSAD, k_BSGD = rotate(q_BSAD, *turn), rotate(k_BSGD, *turn)
    heads = [
        _head(q_BSAD[:, :, h], k_BSGD[:, :, h // per_group], v_BSGD[:, :, h // per_group], width**-0.5, position_BS)
        for h in range(geometry.heads)
    ]
    return torch.cat(heads, dim=-1) @ weights["linear_proj.weight"].T


def _latent(geometry: Geometry, weights: Weights, x_BSH: Tensor, position_BS: Tensor) -> Tensor:
    latent = geometry.latent
    assert latent is not None
    if latent.query_rank is None:
        q = x_BSH @ weights["linear_q.weight"].T
    else:
        q = rms_norm(x_BSH @ weights["linear_q_down.weight"].T, weights["q_layernorm.weight"], 1e-6)
        q = q @ weights["linear_q_up.weight"].T
    q_BSAD = q.view(*x_BSH.shape[:2], geometry.heads, latent.nope + latent.rope)
    down = x_BSH @ weights["linear_kv_down.weight"].T
    kv = rms_norm(down[..., : latent.rank], weights["kv_layernorm.weight"], 1e-6) @ weights["linear_kv_up.weight"].T
    kv_BSAX = kv.view(*x_BSH.shape[:2], geometry.heads, latent.nope + latent.value)
    turn: Any = (position_BS, geometry.rope_theta, geometry.scaling, latent.interleaved)
    q_rope_BSAD = rotate(q_BSAD[..., latent.nope :], *turn)
    k_rope_BSD = rotate(down[..., None, latent.rank :], *turn)[:, :, 0]
    scale = score_factor(geometry.scaling) / (latent.nope + latent.rope) ** 0.5
    heads = []
    for h in range(geometry.heads):
        q_BSD = torch.cat([q_BSAD[:, :, h, : latent.nope], q_rope_BSAD[:, :, h]], dim=-1)
        k_BSD = torch.cat([kv_BSAX[:, :, h, : latent.nope], k_rope_BSD], dim=-1)
        heads.append(_head(q_BSD, k_BSD, kv_BSAX[:, :, h, latent.nope :], scale, position_BS))
    return torch.cat(heads, dim=-1) @ weights["linear_proj.weight"].T


def _head(q_BSD: Tensor, k_BSD: Tensor, v_BSD: Tensor, scale: float, position_BS: Tensor) -> Tensor:
    text_BS = (position_BS == 0).cumsum(dim=1)
    hidden_BSS = text_BS[:, :, None] != text_BS[:, None, :]
    hidden_BSS = hidden_BSS | torch.ones_like(hidden_BSS).triu(1)
    scores_BSS = (q_BSD @ k_BSD.transpose(1, 2) * scale).masked_fill(hidden_BSS, float("-inf"))
    return torch.softmax(scores_BSS, dim=-1) @ v_BSD
