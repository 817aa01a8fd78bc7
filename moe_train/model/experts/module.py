"""The module that owns the weights of this rank's experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_train.model.experts.grouped import experts_grouped
from moe_train.model.experts.reference import experts_reference

_IMPLEMENTATIONS = {"grouped": experts_grouped, "reference": experts_reference}


class Experts(nn.Module):
    """Local experts [first, first + num_local) of the layer's ``num_experts``.

    ``weight1`` [E, 2F, H] holds gate and up projection one above the other, ``weight2`` [E, H, F] the down projection.
    In checkpoints both are one global tensor whose first dimension is the global expert index.
    """

    def __init__(self, num_local: int, first: int, hidden_size: int, width: int, implementation: str) -> None:
        super().__init__()
        self.num_local = num_local
        self.first = first
        self.weight1 = nn.Parameter(torch.empty(num_local, 2 * width, hidden_size))
        self.weight2 = nn.Parameter(torch.empty(num_local, hidden_size, width))
        for weight in (self.weight1, self.weight2):
            # Tells megatron-core and our engine that replicas live in the expert-data group, not in the data group.
            weight.allreduce = False  # type: ignore[attr-defined]
        self.function = _IMPLEMENTATIONS[implementation]

    def forward(self, x_RH: Tensor, counts_E: Tensor, weights_R: Tensor) -> Tensor:
        """Rows sorted by local expert -> rows; weights_R is multiplied in."""
        return self.function(x_RH, counts_E, weights_R, self.weight1, self.weight2)
