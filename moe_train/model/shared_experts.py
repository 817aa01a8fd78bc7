"""The shared expert: a SwiGLU that every token passes, on the input without a gate's shift."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SharedExperts(nn.Module):
    """``weight1`` [2F, H] holds gate and up projection, ``weight2`` [H, F] the down projection."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(torch.empty(2 * width, hidden_size))
        self.weight2 = nn.Parameter(torch.empty(hidden_size, width))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.weight1).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.weight2)
