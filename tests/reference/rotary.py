"""Rotary positions, one frequency at a time.

Suffixes: B sequences, S tokens per sequence, A heads, D width of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.reference.geometry import Scaling


def rotate(x_BSAD: Tensor, position_BS: Tensor, theta: float, scaling: Scaling | None, interleaved: bool) -> Tensor:
    """Turns each pair of elements by its angle: i and i + D / 2, or neighbours."""
    width = x_BSAD.shape[3]
    wide = x_BSAD.dtype if x_BSAD.dtype == torch.float64 else torch.float32
    turned = [torch.empty(0)] * width
    factor = _amplitude(scaling)
    for pair, frequency in enumerate(_frequencies(width, theta, scaling)):
        angle_BS1 = (position_BS.to(wide) * frequency)[..., None]
        cos, sin = (factor * angle_BS1.cos()).to(x_BSAD.dtype), (factor * angle_BS1.sin()).to(x_BSAD.dtype)
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + width // 2)
        turned[i] = x_BSAD[..., i] * cos - x_BSAD[..., j] * sin
        turned[j] = x_BSAD[..., j] * cos + x_BSAD[..., i] * sin
    return torch.stack(turned, dim=-1)


def score_factor(scaling: Scaling | None) -> float:
    """What DeepSeek's models multiply the scores with."""
    if scaling is None or not scaling.mscale_all_dim:
        return 1.0
    return _mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def _frequencies(width: int, theta: float, scaling: Scaling | None) -> list[float]:
    # Rounded to float32, as every implementation keeps them.
    plain = [float(torch.tensor(1.0 / theta ** (i / width))) for i in range(0, width, 2)]
    if scaling is None:
        return plain
    return [_scaled(pair, frequency, width, theta, scaling) for pair, frequency in enumerate(plain)]


def _scaled(pair: int, frequency: float, width: int, theta: float, scaling: Scaling) -> float:
    divided = frequency / scaling.factor
    if scaling.kind == "linear":
        return divided
    if scaling.kind == "llama3":
        rotations = scaling.original_length * frequency / (2 * math.pi)
        kept = min(1.0, max(0.0, (rotations - scaling.low) / (scaling.high - scaling.low)))
        return kept * frequency + (1 - kept) * divided
    assert scaling.kind == "yarn"
    bounds = [
        width * math.log(scaling.original_length / (2 * math.pi * rotations)) / (2 * math.log(theta))
        for rotations in (scaling.beta_fast, scaling.beta_slow)
    ]
    low, high = (math.floor(bounds[0]), math.ceil(bounds[1])) if scaling.truncate else bounds
    low, high = max(low, 0), min(high, width - 1)
    part = (pair - low) / (high - low if high > low else 0.001)
    part = min(1.0, max(0.0, part))
    return part * divided + (1 - part) * frequency


def _amplitude(scaling: Scaling | None) -> float:
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 1 + 0.1 * mscale * math.log(factor)
