"""Rotary position embedding (Su et al. 2021) with the scalings of its frequencies.

Suffixes: S sequence, B batch or 1, N heads, D width of a head, P pairs = D / 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moe_train.model.families import rope_width
from moe_train.model.options import ModelOptions, RopeScaling


class Rotary(nn.Module):
    """Cosines and sines of positions. Holds no state that a checkpoint would keep."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.amplitude = amplitude(options.rope_scaling)
        self.frequencies_P = frequencies(options)

    def forward(self, position_SB: Tensor, dtype: torch.dtype) -> Tensor:
        """[2, S, B, 1, P]."""
        if self.frequencies_P.device != position_SB.device:
            self.frequencies_P = self.frequencies_P.to(position_SB.device)
        return angles(self.frequencies_P, position_SB, self.amplitude, dtype)


def frequencies(options: ModelOptions) -> Tensor:
    """Radians per position of each pair, float32 [P]."""
    width, theta, scaling = rope_width(options), options.rope_theta, options.rope_scaling
    plain_P = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if scaling is None:
        return plain_P
    if scaling.kind == "linear":
        return plain_P / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(plain_P, scaling)
    return _yarn(plain_P, theta, scaling)


def _llama3(plain_P: Tensor, scaling: RopeScaling) -> Tensor:
    length_P = 2 * math.pi / plain_P
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept_P = ((scaling.original_length / length_P - low) / (high - low)).clamp(0.0, 1.0)
    mixed_P = (1 - kept_P) * plain_P / scaling.factor + kept_P * plain_P
    mixed_P = torch.where(length_P > scaling.original_length / low, plain_P / scaling.factor, mixed_P)
    return torch.where(length_P < scaling.original_length / high, plain_P, mixed_P)


def _yarn(plain_P: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Section 3.2 of the paper: the pairs between ``beta_fast`` and ``beta_slow`` rotations are mixed along a ramp."""
    width = 2 * len(plain_P)

    def pair_with(rotations: float) -> float:
        return width * math.log(scaling.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high = high + 0.001 if low == high else high
    divided_P = ((torch.arange(len(plain_P), dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return plain_P / scaling.factor * divided_P + plain_P * (1 - divided_P)


def amplitude(scaling: RopeScaling | None) -> float:
    """Factor on cosine and sine."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor)


def latent_score_scale(options: ModelOptions, head_width: int) -> float:
    """Factor on the scores of latent attention."""
    scale, scaling = head_width**-0.5, options.rope_scaling
    if scaling is not None and scaling.mscale_all_dim:
        scale *= _mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def angles(frequencies_P: Tensor, position_SB: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Cosine and sine at each position times ``scale``, [2, S, B, 1, P], computed in float32 at least."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angle_SB1P = position_SB[:, :, None, None].to(wide) * frequencies_P.to(wide)
    return torch.stack([angle_SB1P.cos() * scale, angle_SB1P.sin() * scale]).to(dtype)


def rotate(x_SBND: Tensor, angles_2SB1P: Tensor, interleaved: bool = False) -> Tensor:
    """Turns each pair by its angle: element i with i + D / 2, or with ``interleaved`` neighbours, whose results come
    out as two halves (scores do not depend on the order)."""
    cos, sin = angles_2SB1P[0], angles_2SB1P[1]
    if interleaved:
        first, second = x_SBND[..., 0::2], x_SBND[..., 1::2]
    else:
        first, second = x_SBND.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
