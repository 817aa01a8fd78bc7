"""Causal attention by a kernel that never holds scores of S x S, where the device has one.

Suffixes: B batch, N query heads, G key/value heads, S queries, L keys, D width of a head's query and key, V of its
value.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def flash_fits(capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's flash kernel for CUDA takes such inputs, forward and backward, without padding them.

    capability: compute capability of the device; None for what is not NVIDIA's. (Conditions: sdp_utils.cpp of torch.)
    """
    if capability is None or capability < (8, 0) or dtype not in (torch.bfloat16, torch.float16):
        return False
    if head_dim % 8 or head_dim > 256:
        return False
    # Devices with less shared memory have no backward pass for these widths.
    small = (8, 6) <= capability <= (8, 9) or capability[0] == 12
    return not (small and 192 < head_dim <= 224)


def flash_takes(x_D: Tensor) -> bool:
    """`flash_fits` of a tensor whose last dimension is D, where it lies."""
    if not x_D.is_cuda:
        return False
    # A ROCm build says "cuda" too, with numbers that mean other devices.
    capability = None if torch.version.hip else torch.cuda.get_device_capability(x_D.device)
    return flash_fits(capability, x_D.dtype, x_D.shape[-1])


def causal_attention(q_BNSD: Tensor, k_BGSD: Tensor, v_BGSV: Tensor, scale: float | None) -> Tensor:
    """[B, N, S, V]; each group of N / G query heads shares one key/value head."""
    return _attention(q_BNSD, k_BGSD, v_BGSV, scale, is_causal=True)


def attend_visible(q_BNSD: Tensor, k_BGLD: Tensor, v_BGLV: Tensor, visible_BSL: Tensor, scale: float | None) -> Tensor:
    """[B, N, S, V] over the keys that each query sees."""
    return _attention(q_BNSD, k_BGLD, v_BGLV, scale, attn_mask=visible_BSL.unsqueeze(1))


def _attention(q_BNSD: Tensor, k_BGLD: Tensor, v_BGLV: Tensor, scale: float | None, **kwargs: Any) -> Tensor:
    grouped, value_width = q_BNSD.shape[1] != k_BGLD.shape[1], v_BGLV.shape[-1]
    scale = q_BNSD.shape[-1] ** -0.5 if scale is None else scale
    q_BNSD, k_BGLD, v_BGLV = one_width(q_BNSD, k_BGLD, v_BGLV)
    if grouped and not _takes_groups(q_BNSD):
        # On CUDA only the flash kernel takes shared heads. What it does not fit (float32, older devices) torch would
        # silently compute with all scores in memory; with repeated heads it has the memory-efficient kernel.
        times = q_BNSD.shape[1] // k_BGLD.shape[1]
        k_BGLD, v_BGLV = (x.repeat_interleave(times, dim=1) for x in (k_BGLD, v_BGLV))
        grouped = False
    out = F.scaled_dot_product_attention(q_BNSD, k_BGLD, v_BGLV, scale=scale, enable_gqa=grouped, **kwargs)
    return out[..., :value_width]


def one_width(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values with zeros up to the widest of them, which kernels without all scores in memory want.
    Scores stay, as long as their scale does."""
    width = max(x.shape[-1] for x in tensors)
    return tuple(x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors)


def _takes_groups(q_BNSD: Tensor) -> bool:
    """Whether a kernel without scores in memory takes shared heads; the one for CPUs does."""
    return not q_BNSD.is_cuda or flash_takes(q_BNSD)
