"""SwiGLU that every token passes: the shared expert, and the feed-forward part of layers without experts.

Suffixes: F inner width, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """``weight1`` [2F, H] holds gate and up projection, ``weight2`` [H, F] the down projection."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(torch.empty(2 * width, hidden_size))
        self.weight2 = nn.Parameter(torch.empty(hidden_size, width))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.weight1).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.weight2)


class DenseLayer(FeedForward):
    """As megatron-core's layers call it."""

    def __init__(self, config: Any, *, width: int, **_: Any) -> None:
        super().__init__(config.hidden_size, width)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """The output and no bias."""
        return super().forward(x), None
