"""The experts' function through grouped matrix multiplication: the fast path of reference.py.

Suffixes as there: R rows sorted by expert, E local experts, H hidden, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNMENT_BYTES = 16
"""The kernel refuses a row stride that is not a multiple of this."""


class _ContiguousGradient(torch.autograd.Function):
    """Identity whose gradient is contiguous: the kernel's backward refuses an expanded one (that of ``y.sum()``)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def experts_grouped(x_RH: Tensor, counts_E: Tensor, weights_R: Tensor, w1_EF2H: Tensor, w2_EHF: Tensor) -> Tensor:
    """SwiGLU experts as two grouped multiplications; see experts_reference for the function.

    Rows beyond the sum of ``counts_E`` hold whatever was in memory, and so do their gradients: the caller never
    reads them (dispatch.py masks them).
    """
    offsets_E = counts_E.to(x_RH.device).cumsum(0).to(torch.int32)
    w1_EF2H, w2_EHF = _aligned(w1_EF2H, w2_EHF)
    gate_RF, up_RF = F.grouped_mm(x_RH, w1_EF2H.transpose(1, 2), offs=offsets_E).chunk(2, dim=-1)
    inner_RF = (F.silu(gate_RF) * up_RF * weights_R[:, None]).to(x_RH.dtype)
    return _ContiguousGradient.apply(F.grouped_mm(inner_RF, w2_EHF.transpose(1, 2), offs=offsets_E))


def _aligned(w1_EF2H: Tensor, w2_EHF: Tensor) -> tuple[Tensor, Tensor]:
    """The weights with the expert width padded by zeros up to what the kernel takes. silu(0) * 0 = 0, so a padded
    column adds nothing; the padding exists only here, never in parameters, checkpoints or counts."""
    width = w2_EHF.shape[2]
    multiple = max(1, _ALIGNMENT_BYTES // w1_EF2H.element_size())
    missing = -width % multiple
    if missing == 0:
        return w1_EF2H, w2_EHF
    gate_EFH, up_EFH = w1_EF2H.chunk(2, dim=1)
    w1_EF2H = torch.cat([F.pad(gate_EFH, (0, 0, 0, missing)), F.pad(up_EFH, (0, 0, 0, missing))], dim=1)
    return w1_EF2H, F.pad(w2_EHF, (0, missing))
