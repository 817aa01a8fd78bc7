"""The texts of a micro-batch that do not see each other: where they lie, and attention inside each of them.

Suffixes: S sequence, B batch, T = B * S tokens in the order [B, S], N query heads, G key/value heads, L tokens of one
text, D width of a head's query and key, V of its value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moe_train.model.kernels import causal_attention, flash_takes, one_width


@dataclass(frozen=True)
class Texts:
    """Boundaries of texts; each begins in one sequence and ends there."""

    position_SB: Tensor
    """int64: offset of each token inside its text."""
    lengths: list[int]
    """Tokens of each text, in the order [B, S]."""
    ends: Tensor
    """int32 [texts + 1]: where each begins in that order, and the number of tokens."""


def texts_of(position_BS: Tensor, device: torch.device) -> Texts:
    """From offsets inside the texts on the CPU, 0 where one begins and at the beginning of each sequence."""
    assert position_BS.device.type == "cpu" and bool((position_BS[:, 0] == 0).all())
    starts = (position_BS.reshape(-1) == 0).nonzero()[:, 0]
    ends = torch.cat([starts, torch.tensor([position_BS.numel()])])
    return Texts(position_BS.t().to(device), ends.diff().tolist(), ends.to(device, torch.int32))


def attend_reference(q_TND: Tensor, k_TGD: Tensor, v_TGV: Tensor, texts: Texts, scale: float | None) -> Tensor:
    """Causal attention inside each text, one after the other, [T, N, D]."""
    parts = []
    for q, k, v in zip(*(x.split(texts.lengths) for x in (q_TND, k_TGD, v_TGV)), strict=True):
        q_1NLD, k_1GLD, v_1GLD = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out_1NLD = causal_attention(q_1NLD, k_1GLD, v_1GLD, scale)
        parts.append(out_1NLD[0].transpose(0, 1))
    return torch.cat(parts)


def attend(q_TND: Tensor, k_TGD: Tensor, v_TGV: Tensor, texts: Texts, scale: float | None) -> Tensor:
    """As the reference; all texts in one kernel where torch has one for this type, head width and device."""
    wide = one_width(q_TND, k_TGD, v_TGV)
    kernel = _variable_length_kernel() if flash_takes(wide[0]) else None
    if kernel is None:
        return attend_reference(q_TND, k_TGD, v_TGV, texts, scale)
    longest, value_width = max(texts.lengths), v_TGV.shape[-1]
    out_TND = kernel(
        *(x.contiguous() for x in wide),
        texts.ends,
        texts.ends,
        longest,
        longest,
        scale=q_TND.shape[-1] ** -0.5 if scale is None else scale,
        window_size=(-1, 0),
        enable_gqa=q_TND.shape[1] != k_TGD.shape[1],
    )
    return out_TND[..., :value_width]


@lru_cache(maxsize=1)
def _variable_length_kernel() -> Callable[..., Any] | None:
    """torch's varlen_attn in the form that has grouped heads and a window; earlier ones are not used."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"window_size", "enable_gqa", "scale"} <= takes.keys() else None
