"""RMSNorm as megatron-core's specs build it.

Suffixes: N any leading dimensions, H the normalised one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))

    def forward(self, x_NH: Tensor) -> Tensor:
        # torch fuses the function on an accelerator and knows how to accumulate short types; on the CPU it is a dozen
        # passes over memory.
        if x_NH.device.type == "cpu" and x_NH.dtype == self.weight.dtype in (torch.float32, torch.float64):
            return rms_norm_cpu(x_NH, self.weight, self.eps)
        return rms_norm_reference(x_NH, self.weight, self.eps)


def rms_norm_reference(x_NH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x_NH, weight_H.shape, weight_H, eps)


def rms_norm_cpu(x_NH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """The reference's function in fewer passes, forward and backward."""
    return _RMSNorm.apply(x_NH, weight_H, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        scale_N1 = torch.linalg.vector_norm(x_NH, dim=-1, keepdim=True).square_()
        scale_N1.div_(x_NH.shape[-1]).add_(eps).rsqrt_()
        normal_NH = x_NH * scale_N1
        ctx.save_for_backward(normal_NH, scale_N1, weight_H)
        return normal_NH * weight_H

    @staticmethod
    def backward(ctx: Any, dy_NH: Tensor) -> tuple[Tensor, Tensor, None]:
        # With n = x * scale: dx = scale * (dy * w - n * mean(dy * w * n)), dw = sum over N of dy * n.
        normal_NH, scale_N1, weight_H = ctx.saved_tensors
        product_NH = dy_NH * normal_NH
        mean_N1 = torch.matmul(product_NH, weight_H).unsqueeze(-1).div_(weight_H.shape[0])
        dx_NH = (dy_NH * weight_H).addcmul_(normal_NH, mean_N1, value=-1).mul_(scale_N1)
        return dx_NH, product_NH.flatten(0, -2).sum(0), None
