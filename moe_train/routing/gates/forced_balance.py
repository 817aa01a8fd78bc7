"""A control with perfect balance: the experts by turn, the weights learned.

Suffixes: T tokens, H hidden, E experts, K chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.routing.arithmetic import softmax_over
from moe_train.routing.interface import Routing, TokenBatch
from moe_train.routing.linear_gate import LinearGate
from moe_train.routing.registry import register_gate
from moe_train.routing.round_robin import round_robin
from moe_train.routing.topk import check_top_k, check_top_k_fits, slots, top_k


@dataclass(frozen=True)
class ForcedBalanceOptions:
    top_k: int = 2
    renormalize: bool = True
    """Divide the selected probabilities by their sum."""

    def __post_init__(self) -> None:
        check_top_k(self.top_k)
        if self.top_k == 1 and self.renormalize:
            raise ValueError(
                "top_k 1 with renormalize gives every weight the value 1 and the gate no gradient:"
                " set renormalize: false, or a larger top_k"
            )


@register_gate("forced_balance", ForcedBalanceOptions)
class ForcedBalanceGate(LinearGate):
    """Token at position s of sample b gets the k experts (k s + b + j) mod E, j < k; weights p_e = softmax(W x)_e of
    those, or p_e / sum of the selected p with ``renormalize``.

    The choice reads position and sample alone, so it is even over every sequence, to one token; only the weights are
    learned. Its gap to a gate that chooses is what choosing is worth. ``router.forced_balance`` does the same to any
    gate, for benchmarks. Shapes: x [T, H], ``weight`` [E, H], probabilities and weights [T, E]. Time O(T E H), memory
    O(T E). No bias and no switch loss: the balance is given. Source: the forced-balance modes of torchtitan (PR 1670)
    and Megatron-LM, which are for measuring speed.
    """

    takes_switch_loss = False
    ties = "none"

    def __init__(self, hidden_size: int, num_experts: int, options: ForcedBalanceOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts)
        self.options = options or ForcedBalanceOptions()
        check_top_k_fits(self.options.top_k, num_experts)
        self.max_k = self.options.top_k

    @property
    def weight_sum(self) -> float | None:
        return 1.0 if self.options.renormalize else None

    def forward(
        self,
        tokens_TH: Tensor,
        batch: TokenBatch,
        *,
        bias_E: Tensor | None = None,
        replay_TE: Tensor | None = None,
    ) -> Routing:
        assert bias_E is None, "forced_balance takes no bias"
        logits_TE = self.logits(tokens_TH)
        selected_TE = round_robin(batch, self.options.top_k, self.num_experts) if replay_TE is None else replay_TE
        probs_TE = torch.softmax(logits_TE, dim=-1)
        renormalize = self.options.renormalize
        return Routing(
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            weights_TE=softmax_over(logits_TE, selected_TE) if renormalize else probs_TE * selected_TE,
            selected_TE=selected_TE,
            kept_TE=selected_TE,
            experts_TK=slots(top_k(logits_TE, self.options.top_k, among_TE=selected_TE), selected_TE),
        )
