"""Tokens assigned to experts so that the load is even and the total score as large as it can be.

Suffixes: T tokens, H hidden, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.routing.gates.assignment import balanced_assignment
from moe_train.routing.interface import Routing, TokenBatch
from moe_train.routing.linear_gate import LinearGate
from moe_train.routing.pools import Pool, from_pools, padding_in_pools, to_pools
from moe_train.routing.registry import register_gate
from moe_train.routing.topk import select_top_k


@dataclass(frozen=True)
class BaseOptions:
    pool: Pool = "sequence"
    """Tokens that are assigned together."""


@register_gate("base", BaseOptions)
class BaseGate(LinearGate):
    """l = W x; of all assignments of one expert to each token of a pool that give every expert equally many, the one
    with the largest sum of l; weight sigmoid(l_e).

    Where E does not divide the pool's n tokens, an expert gets floor(n / E) or one more; which ones get more is part of
    the optimum. Not causal: a token's expert depends on all tokens of the pool. In evaluation mode the largest l.
    Solved exactly (assignment.py), on the host: the forward pass waits for the device, and time grows with the number
    of tokens that their best expert has no room for. Equal scores: whatever the solver meets first, always the same;
    in evaluation the lower expert. Padding is in no pool. Shapes: x [T, H], ``weight`` [E, H], logits, probabilities
    and weights [T, E]. The load is even by construction: no bias, no switch loss. Source: Lewis et al. 2021
    (arXiv 2103.16716), eq. 2 to 5. There the pool is a random share of all workers' tokens, and E divides it; fairseq's
    code solves to within a tolerance by an auction, and lets the rest of the weight, 1 - sigmoid(l_e), pass the token
    itself, which the paper's eq. 2 and this do not.
    """

    causal = False
    inference_rule = "each token takes the expert with the largest logit"
    takes_switch_loss = False
    takes_capacity = False
    ties = "none"
    evaluation_ties = "expert"
    synchronises = True

    def __init__(self, hidden_size: int, num_experts: int, options: BaseOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts)
        self.options = options or BaseOptions()
        self.max_k = 1
        self.pool = self.options.pool
        larger = "router.options.pool=micro_batch" if self.pool == "sequence" else "a larger train.micro_batch_size"
        self.remedies = (f"pools of more tokens than experts ({larger})",)

    def forward(
        self,
        tokens_TH: Tensor,
        batch: TokenBatch,
        *,
        bias_E: Tensor | None = None,
        replay_TE: Tensor | None = None,
    ) -> Routing:
        assert bias_E is None, "base takes no bias"
        logits_TE = self.logits(tokens_TH)
        chosen_TE = replay_TE
        if self.training and chosen_TE is None:
            chosen_TE = self._assigned(logits_TE.detach(), batch)
        selected_TE, experts_TK = select_top_k(logits_TE, 1, batch.padding_T, chosen_TE)
        return Routing(
            logits_TE=logits_TE,
            probs_TE=torch.softmax(logits_TE, dim=-1),
            weights_TE=torch.sigmoid(logits_TE) * selected_TE,
            selected_TE=selected_TE,
            kept_TE=selected_TE,
            experts_TK=experts_TK,
        )

    def _assigned(self, logits_TE: Tensor, batch: TokenBatch) -> Tensor:
        pool = self.options.pool
        expert_PM = balanced_assignment(to_pools(logits_TE, batch, pool), padding_in_pools(batch, pool))
        expert_T1 = from_pools(expert_PM[..., None], batch, pool).to(logits_TE.device)
        return expert_T1 == torch.arange(self.num_experts, device=logits_TE.device)
