"""SwiGLU that every token passes: the shared expert, and the feed-forward part of layers without experts.

Under tensor parallelism each rank has an equal share of the inner width, of the gate and of the up projection alike,
and what comes out must be summed over the ranks.

Suffixes: F inner width on this rank, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.model.sequence_parallel import SequenceParallel
from moe_train.parallel.shard import divide


class FeedForward(nn.Module):
    """``weight1`` [2F, H] holds gate and up projection, ``weight2`` [H, F] the down projection.

    ``group``: ranks that share ``width`` among them; None for one rank.
    """

    def __init__(self, hidden_size: int, width: int, group: Any = None) -> None:
        super().__init__()
        width //= 1 if group is None else group.size()
        self.weight1 = nn.Parameter(torch.empty(2 * width, hidden_size))
        self.weight2 = nn.Parameter(torch.empty(hidden_size, width))
        if group is not None:
            divide(self.weight1, 0, group, parts=2)
            divide(self.weight2, 1, group)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's summand."""
        gate, up = F.linear(x, self.weight1).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.weight2)


class DenseLayer(FeedForward):
    """As megatron-core's layers call it."""

    def __init__(self, config: Any, *, width: int, group: Any, **_: Any) -> None:
        super().__init__(config.hidden_size, width, group)
        self.sequence = SequenceParallel(group)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """The output and no bias, both of this rank's positions."""
        return self.sequence.scatter_sum(super().forward(self.sequence.gather(x))), None
