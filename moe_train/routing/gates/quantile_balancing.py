"""Top-k above a threshold per expert that moves to the quantile at which the load is even.

Suffixes: T tokens, H hidden, E experts, K chosen, P pools, M tokens of a pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.routing.arithmetic import softmax_over
from moe_train.routing.interface import Routing, TokenBatch
from moe_train.routing.linear_gate import LinearGate
from moe_train.routing.pools import Pool, padding_in_pools, to_pools, tokens_in_pools
from moe_train.routing.registry import register_gate
from moe_train.routing.topk import check_top_k, select_top_k

_UNIT = 2.0**-24
_LARGEST = 2.0**16
"""Quantiles are summed as whole multiples of the unit, so that their order does not matter."""


@dataclass(frozen=True)
class QuantileBalancingOptions:
    top_k: int = 2
    weights: Literal["softmax", "sigmoid"] = "softmax"
    """Of the selected logits, always divided by their sum except for top_k 1."""
    ema: float = 0.0
    """Share of the old threshold that stays in a step, in [0, 1)."""
    scope: Pool = "sequence"
    """Tokens that a quantile is taken over; the step's threshold is the mean of all quantiles."""

    def __post_init__(self) -> None:
        check_top_k(self.top_k)
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; it must be at least 0 and below 1")


@register_gate("quantile_balancing", QuantileBalancingOptions)
class QuantileBalancingGate(LinearGate):
    """l = W x; the k experts with the largest l - beta. Weights from l alone: softmax(l)_e / sum of the selected, or
    sigmoid(l_e) / sum of the selected; for k = 1 not divided.

    ``beta`` [E], a float32 buffer, starts at 0 and moves once per step. With alpha_t the (k+1)-th largest l - beta of
    token t, which an expert must beat to be chosen, q_e = the (floor(n k / E) + 1)-th largest l_te - alpha_t over the
    n tokens of a pool: with beta_e = q_e, alpha unchanged, floor(n k / E) tokens choose e, or fewer where tokens are at
    q_e (all whose (k+1)-th expert is e are at the old beta_e). The step's beta is ema * beta + (1 - ema) * mean of q
    over all pools of all ranks and micro-batches, then centred. So balance holds for
    the next step as far as its tokens and weights are like this step's. Causal: beta is old when it is used, and in
    evaluation it stays. Needs k < E. Ties: the lower expert. Padding counts nowhere. Shapes: x [T, H], ``weight``
    [E, H], logits, probabilities and weights [T, E]. Time O(T E (H + log T)), memory O(T E). No further bias; a switch
    loss is possible and not needed.

    Sources: J. Su, kexue.fm/archives/11619 (2026); Megatron-LM PR 5349. As there: scores are logits whatever the
    weights are, the threshold is replaced rather than pushed, ema 0 by default. Different: the pool is a sequence, so
    that the split into micro-batches does not matter (there a micro-batch per rank, equally weighted: ``scope:
    micro_batch``); padding is left out (there refused); auxiliary losses are not refused. Later versions
    (Megatron-LM PR 6802, torchtitan PR 4577, Kimi K3) take one quantile over the global batch from a histogram of
    sigmoid scores, which is not built here.
    """

    state_follows = MappingProxyType({"beta": "floats"})
    sum_units = MappingProxyType({"quantile": _UNIT})
    beta: Tensor

    def __init__(self, hidden_size: int, num_experts: int, options: QuantileBalancingOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts)
        self.options = options or QuantileBalancingOptions()
        if self.options.top_k >= num_experts:
            raise ValueError(
                f"top_k is {self.options.top_k}, but a threshold needs an expert more than that, and there are"
                f" {num_experts}"
            )
        self.max_k = self.options.top_k
        self.remedies = (f"a larger router.options.ema (it is {self.options.ema:g}) where the load swings",)
        if self.options.scope == "sequence":
            self.remedies += ("router.options.scope=micro_batch where sequences differ much",)
        self.register_buffer("beta", torch.zeros(num_experts, dtype=torch.float32))

    @property
    def weight_sum(self) -> float | None:
        return 1.0 if self.options.top_k > 1 else None

    def forward(
        self,
        tokens_TH: Tensor,
        batch: TokenBatch,
        *,
        bias_E: Tensor | None = None,
        replay_TE: Tensor | None = None,
    ) -> Routing:
        assert bias_E is None, "quantile_balancing takes no bias"
        logits_TE = self.logits(tokens_TH)
        scores_TE = logits_TE.detach() - self.beta
        selected_TE, experts_TK = select_top_k(scores_TE, self.options.top_k, batch.padding_T, replay_TE)
        quantile_E, pools = self._quantiles(logits_TE.detach(), scores_TE, batch)
        return Routing(
            logits_TE=logits_TE,
            probs_TE=torch.softmax(logits_TE, dim=-1),
            weights_TE=self._weights(logits_TE, selected_TE),
            selected_TE=selected_TE,
            kept_TE=selected_TE,
            experts_TK=experts_TK,
            sums={"quantile": quantile_E, "quantile_pools": pools},
        )

    def _weights(self, logits_TE: Tensor, selected_TE: Tensor) -> Tensor:
        softmax = self.options.weights == "softmax"
        if self.options.top_k == 1:
            return (torch.softmax(logits_TE, dim=-1) if softmax else torch.sigmoid(logits_TE)) * selected_TE
        # sigmoid(l_e) / sum is the softmax of log sigmoid(l), which does not underflow.
        return softmax_over(logits_TE if softmax else F.logsigmoid(logits_TE), selected_TE)

    def _quantiles(self, logits_TE: Tensor, scores_TE: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Sum of the pools' quantiles, int64 [E] in units of 2^-24, and the number of pools that hold a token."""
        k, scope = self.options.top_k, self.options.scope
        alpha_T1 = torch.topk(scores_TE, k + 1, dim=-1).values[:, k:]
        margin_PME = to_pools(logits_TE - alpha_T1, batch, scope)
        margin_PME = margin_PME.masked_fill(padding_in_pools(batch, scope)[..., None], -torch.inf)
        tokens_P = tokens_in_pools(batch, scope)
        place_P1E = (tokens_P * k // self.num_experts)[:, None, None].expand(-1, 1, self.num_experts)
        falling_PME = torch.sort(margin_PME, dim=1, descending=True).values
        quantile_PE = torch.gather(falling_PME, 1, place_P1E)[:, 0].clamp(-_LARGEST, _LARGEST)
        units_PE = (quantile_PE.double() / _UNIT).round().long()
        present_P = tokens_P > 0
        return (units_PE * present_P[:, None]).sum(0), present_P.sum()

    @torch.no_grad()
    def after_step(self, sums: dict[str, Tensor]) -> None:
        pools = sums["quantile_pools"]
        mean_E = (sums["quantile"].double() / pools.clamp(min=1) * _UNIT).to(self.beta.dtype)
        moved_E = self.options.ema * self.beta + (1 - self.options.ema) * mean_E
        self.beta.copy_(torch.where(pools > 0, moved_E - moved_E.mean(), self.beta))
