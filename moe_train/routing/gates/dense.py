"""A control without sparsity: every expert for every token.

Suffixes: T tokens, H hidden, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.routing.arithmetic import softmax_over
from moe_train.routing.interface import Routing, TokenBatch
from moe_train.routing.linear_gate import LinearGate
from moe_train.routing.registry import register_gate
from moe_train.routing.topk import select_top_k


@dataclass(frozen=True)
class DenseOptions:
    """None."""


@register_gate("dense", DenseOptions)
class DenseGate(LinearGate):
    """All E experts for every token, weights softmax(W x).

    The upper end of what a choice of experts could reach with these experts, at E / k times the computation. Shapes:
    x [T, H], ``weight`` [E, H], probabilities and weights [T, E]. Time O(T E H) besides that of all experts, memory
    O(T E). The load is even whatever the weights are, so no bias and no switch loss. Source: Jacobs et al. 1991
    ("Adaptive mixtures of local experts"), eq. 1 with a softmax.
    """

    takes_switch_loss = False
    weight_sum = 1.0

    def __init__(self, hidden_size: int, num_experts: int, options: DenseOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts)
        self.options = options or DenseOptions()
        self.max_k = num_experts

    def forward(
        self,
        tokens_TH: Tensor,
        batch: TokenBatch,
        *,
        bias_E: Tensor | None = None,
        replay_TE: Tensor | None = None,
    ) -> Routing:
        assert bias_E is None, "dense takes no bias"
        logits_TE = self.logits(tokens_TH)
        selected_TE, experts_TK = select_top_k(logits_TE, self.num_experts, batch.padding_T, replay_TE)
        return Routing(
            logits_TE=logits_TE,
            probs_TE=torch.softmax(logits_TE, dim=-1),
            weights_TE=softmax_over(logits_TE, selected_TE),
            selected_TE=selected_TE,
            kept_TE=selected_TE,
            experts_TK=experts_TK,
        )
