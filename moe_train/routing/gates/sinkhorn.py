"""Top-k of scores that were balanced over a pool of tokens.

Suffixes: T tokens, H hidden, E experts, K chosen, P pools, M tokens of a pool.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.routing.interface import Routing, TokenBatch
from moe_train.routing.linear_gate import LinearGate
from moe_train.routing.pools import Pool, from_pools, padding_in_pools, to_pools
from moe_train.routing.registry import register_gate
from moe_train.routing.topk import check_top_k, check_top_k_fits, mask_of, select_top_k, top_k


@dataclass(frozen=True)
class SinkhornOptions:
    top_k: int = 1
    iterations: int = 20
    """Normalisations of the columns and of the rows; 0 leaves the scores as they are."""
    temperature: float = 1.0
    """Scores are divided by it first: lower is nearer to the best assignment, and slower to become even."""
    pool: Pool = "sequence"
    """Tokens over which experts get equal mass."""

    def __post_init__(self) -> None:
        check_top_k(self.top_k)
        if self.iterations < 0:
            raise ValueError(f"iterations is {self.iterations}; it must not be negative")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0 and finite")


@register_gate("sinkhorn", SinkhornOptions)
class SinkhornGate(LinearGate):
    """l = W x; Pi = diag(a) exp(l / temperature) diag(b) with rows that sum to 1 / n and columns that sum to 1 / E over
    a pool of n tokens; the k largest Pi of each token. Weights: sigmoid(l_e) for k = 1, softmax(l)_e over all experts
    for k > 1; never from Pi, which has no gradient.

    Not causal: b depends on all tokens of the pool. In evaluation mode the k largest l. A column normalisation comes
    last, so experts have equal mass; equal load only as far as Pi is sharp. A token's row is only scaled by a, so Pi is
    ranked as l / temperature + log b. Ties: the lower expert. Padding is in no pool. Shapes: x [T, H], ``weight``
    [E, H], logits, probabilities and weights [T, E]. Time O(T E (H + iterations)), memory O(T E). No bias, which b is
    already. Sources: Clark et al. 2022 (arXiv 2202.01169), S-BASE, appendix on the Sinkhorn algorithm; megatron-core's
    ``sinkhorn`` (weights as here), which works on exponentials with 1e-8 added to sums and stops, waiting for the
    device, when b moves less than 1e-4 (here: logarithms and a fixed number of iterations), counts padding, and takes
    a micro-batch for the pool.
    """

    causal = False
    inference_rule = "each token takes the top_k experts with the largest logits"

    def __init__(self, hidden_size: int, num_experts: int, options: SinkhornOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts)
        self.options = options or SinkhornOptions()
        check_top_k_fits(self.options.top_k, num_experts)
        self.max_k = self.options.top_k
        self.pool = self.options.pool
        self.remedies = (
            f"a smaller router.options.temperature (it is {self.options.temperature:g}) with more"
            f" router.options.iterations (now {self.options.iterations})",
        )

    def forward(
        self,
        tokens_TH: Tensor,
        batch: TokenBatch,
        *,
        bias_E: Tensor | None = None,
        replay_TE: Tensor | None = None,
    ) -> Routing:
        assert bias_E is None, "sinkhorn takes no bias"
        logits_TE = self.logits(tokens_TH)
        chosen_TE = replay_TE
        if self.training and chosen_TE is None:
            best_TK = top_k(self._balanced(logits_TE.detach(), batch), self.options.top_k)
            chosen_TE = mask_of(best_TK, self.num_experts) & ~batch.padding_T[:, None]
        selected_TE, experts_TK = select_top_k(logits_TE, self.options.top_k, batch.padding_T, chosen_TE)
        probs_TE = torch.softmax(logits_TE, dim=-1)
        return Routing(
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            weights_TE=(torch.sigmoid(logits_TE) if self.options.top_k == 1 else probs_TE) * selected_TE,
            selected_TE=selected_TE,
            kept_TE=selected_TE,
            experts_TK=experts_TK,
        )

    def _balanced(self, logits_TE: Tensor, batch: TokenBatch) -> Tensor:
        """l / temperature + log b."""
        pool, options = self.options.pool, self.options
        scores_PME = to_pools(logits_TE / options.temperature, batch, pool)
        columns_PE = log_column_factors(scores_PME, padding_in_pools(batch, pool), options.iterations)
        return from_pools(scores_PME + columns_PE[:, None], batch, pool)


def log_column_factors(scores_PME: Tensor, padding_PM: Tensor, iterations: int) -> Tensor:
    """log b [P, E] of diag(a) exp(scores) diag(b) after so many normalisations of rows, then columns; up to a constant
    per pool. Zero for a pool of padding."""
    log_b_PE = torch.zeros_like(scores_PME[:, 0])
    empty_P1 = padding_PM.all(dim=1, keepdim=True)
    lowest = torch.finfo(scores_PME.dtype).min
    for _ in range(iterations):
        log_a_PM = -torch.logsumexp(scores_PME + log_b_PE[:, None], dim=2)
        mass_PME = (scores_PME + log_a_PM[..., None]).masked_fill(padding_PM[..., None], lowest)
        log_b_PE = -torch.logsumexp(mass_PME, dim=1)
        # The largest at 0: the constant does not matter, and factors stay small whatever the scores are.
        log_b_PE = (log_b_PE - log_b_PE.amax(dim=1, keepdim=True)).masked_fill(empty_P1, 0.0)
    return log_b_PE
