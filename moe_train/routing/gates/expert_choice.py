"""Experts choose tokens: each takes those with the highest probability for it.

Suffixes: T tokens, H hidden, E experts, K chosen, P pools, M tokens of a pool.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.routing.interface import Routing, TokenBatch
from moe_train.routing.linear_gate import LinearGate
from moe_train.routing.pools import Pool, from_pools, padding_in_pools, rank_in_pool, to_pools, tokens_in_pools
from moe_train.routing.registry import register_gate
from moe_train.routing.topk import mask_of, top_k


@dataclass(frozen=True)
class ExpertChoiceOptions:
    capacity_factor: float = 2.0
    """Experts per token on average."""
    pool: Pool = "sequence"
    """Tokens that an expert chooses from."""

    def __post_init__(self) -> None:
        if not 0 < self.capacity_factor < math.inf:
            raise ValueError(f"capacity_factor is {self.capacity_factor}; it must be above 0 and finite")


@register_gate("expert_choice", ExpertChoiceOptions)
class ExpertChoiceGate(LinearGate):
    """S = softmax(W x) over experts; each expert takes the C = ceil(c n / E) tokens with the largest S of a pool of n
    tokens (c the capacity factor); weights S, not renormalised. A token may have any number of experts, also none.

    Not causal: whether a token is taken depends on later tokens of the pool. In evaluation mode the tokens choose: the
    round(c) experts (halves up) with the largest S, at least one. That is the number of experts that a token has on
    average in training, and weights mean the same; but no token is left out and none gets more, which the model has not
    seen.
    Equal scores: the earlier token, in evaluation the lower expert. Padding is in no pool. Shapes: x [T, H], ``weight``
    [E, H], probabilities and weights [T, E]. Time O(T E (H + log T)), memory O(T E). The load is even by construction:
    no bias, no switch loss. Source: Zhou et al. 2022 (arXiv 2202.09368), eq. 1 and 2, whose pool is a group of the
    batch; their bound on experts per token (section 3.3, worse in their tests) is left out.
    """

    causal = False
    varies_k = True
    inference_rule = "each token takes the round(capacity_factor) experts with the largest probability"
    takes_switch_loss = False
    takes_capacity = False
    ties = "token"
    evaluation_ties = "expert"

    def __init__(self, hidden_size: int, num_experts: int, options: ExpertChoiceOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts)
        self.options = options or ExpertChoiceOptions()
        if self.options.capacity_factor > num_experts:
            raise ValueError(
                f"capacity_factor is {self.options.capacity_factor}, but a token can have no more than {num_experts}"
                " experts"
            )
        self.pool = self.options.pool

    @property
    def mean_k(self) -> float:
        return self.options.capacity_factor

    def forward(
        self,
        tokens_TH: Tensor,
        batch: TokenBatch,
        *,
        bias_E: Tensor | None = None,
        replay_TE: Tensor | None = None,
    ) -> Routing:
        assert bias_E is None, "expert_choice takes no bias"
        logits_TE = self.logits(tokens_TH)
        probs_TE = torch.softmax(logits_TE, dim=-1)
        selected_TE = replay_TE
        if selected_TE is None:
            selected_TE = (
                self._chosen_by_experts(probs_TE, batch) if self.training else self._chosen_by_tokens(probs_TE)
            )
            selected_TE = selected_TE & ~batch.padding_T[:, None]
        return Routing(
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            weights_TE=probs_TE * selected_TE,
            selected_TE=selected_TE,
            kept_TE=selected_TE,
        )

    def _chosen_by_experts(self, probs_TE: Tensor, batch: TokenBatch) -> Tensor:
        pool = self.options.pool
        rank_PME = rank_in_pool(to_pools(probs_TE, batch, pool), padding_in_pools(batch, pool))
        share = self.options.capacity_factor / self.num_experts
        # A hair less, so that rounding of the product makes no 4 a 5.
        capacity_P = torch.ceil(tokens_in_pools(batch, pool).double() * share - 1e-9)
        return from_pools(rank_PME < capacity_P[:, None, None], batch, pool)

    def _chosen_by_tokens(self, probs_TE: Tensor) -> Tensor:
        k = max(1, math.floor(self.options.capacity_factor + 0.5))
        return mask_of(top_k(probs_TE, k), self.num_experts)
