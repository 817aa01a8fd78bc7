"""What gates share whose scores are one linear map of the hidden state.

Suffixes: T tokens, H hidden, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.routing.arithmetic import full_precision, gate_dtype
from moe_train.routing.interface import Gate


class LinearGate(Gate):
    """``weight`` [E, H] (normal, std 0.02; a training draws its own initial values) and the scores W x."""

    expert_rows = ("weight",)

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__(hidden_size, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def logits(self, tokens_TH: Tensor) -> Tensor:
        """W x [T, E] in float32 whatever comes in (float64 stays), also under autocast."""
        dtype = gate_dtype(tokens_TH, self.weight)
        with full_precision(tokens_TH):
            return F.linear(tokens_TH.to(dtype), self.weight.to(dtype))
