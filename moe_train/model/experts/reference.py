"""The experts' function in plain PyTorch: the slow reference of grouped.py, for any floating-point type.

Suffixes: R rows (one per chosen token-expert pair, sorted by expert), E local experts, H hidden, F expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def experts_reference(x_RH: Tensor, counts_E: Tensor, weights_R: Tensor, w1_EF2H: Tensor, w2_EHF: Tensor) -> Tensor:
    """SwiGLU experts, each on its own slice of rows; the combine weight multiplies the inner activation.

    ``counts_E`` says how many rows each expert owns; rows beyond their sum belong to no expert and give zero.
    """
    counts = counts_E.tolist()
    owned = sum(counts)
    outputs = []
    start = 0
    # unbind and not w1_EF2H[i]: one backward node for all experts instead of one full-size gradient per expert.
    for count, w1_F2H, w2_HF in zip(counts, w1_EF2H.unbind(0), w2_EHF.unbind(0), strict=True):
        rows = slice(start, start + count)
        start += count
        gate_RF, up_RF = (x_RH[rows] @ w1_F2H.t()).chunk(2, dim=-1)
        inner_RF = (F.silu(gate_RF) * up_RF * weights_R[rows, None]).to(x_RH.dtype)
        outputs.append(inner_RF @ w2_HF.t())
    outputs.append(x_RH.new_zeros(x_RH.shape[0] - owned, x_RH.shape[1]))
    return torch.cat(outputs)
