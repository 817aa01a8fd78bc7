"""The plain gate: one linear map, softmax, the k largest.

Suffixes: T tokens, H hidden, E experts, K chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_train.routing.arithmetic import softmax_over
from moe_train.routing.groups import check_group_options, check_groups_fit, in_best_groups
from moe_train.routing.interface import Routing, TokenBatch
from moe_train.routing.linear_gate import LinearGate
from moe_train.routing.registry import register_gate
from moe_train.routing.topk import check_top_k, check_top_k_fits, select_top_k


@dataclass(frozen=True)
class SoftmaxTopKOptions:
    top_k: int = 2
    softmax: Literal["before", "after"] = "before"
    """before: over all experts, then select; after: over the selected experts only."""
    renormalize: bool = True
    """Divide the selected probabilities by their sum; only asked where softmax is ``before``."""
    scaling: float = 1.0
    """All combine weights times this, after renormalisation."""
    num_groups: int = 1
    """Groups of neighbouring experts, all of one size."""
    groups_per_token: int = 1
    """Groups that a token may choose experts from."""

    def __post_init__(self) -> None:
        check_top_k(self.top_k)
        if not 0 < self.scaling < float("inf"):
            raise ValueError(f"scaling is {self.scaling}; it must be above 0 and finite")
        check_group_options(self.num_groups, self.groups_per_token)
        if self.top_k == 1 and self.sums_to_one:
            raise ValueError(
                "top_k 1 with weights that sum to one gives every weight the value of scaling and the gate no gradient:"
                " set softmax: before and renormalize: false, or a larger top_k"
            )

    @property
    def sums_to_one(self) -> bool:
        return self.renormalize or self.softmax == "after"


@register_gate("softmax_topk", SoftmaxTopKOptions)
class SoftmaxTopKGate(LinearGate):
    """l = W x; the k experts with the largest l + bias; weights p_e = softmax(l)_e of the selected, or p_e / sum of the
    selected p (which is the softmax over the selected logits: ``after``, and ``before`` with ``renormalize``), times
    ``scaling``.

    With ``num_groups`` above 1 only experts of the ``groups_per_token`` best groups can be selected; the score of a
    group is its largest l + bias (DeepSeek-V2, arXiv 2405.04434, section 2.2.2: device-limited routing, a group being
    the experts of one device; its published code scales unless it renormalises, here both go together). Ties, also of
    groups, go to the lower index. Shapes: x [T, H], ``weight`` [E, H], logits, probabilities and weights [T, E]. Time
    O(T E H), memory O(T E). ValueError where groups do not divide the experts or hold fewer than k of them. Sources:
    Shazeer et al. 2017 (softmax after selection); Fedus et al. 2021, Lepikhin et al. 2020 (before); Jiang et al. 2024
    (Mixtral: after); Qwen3-MoE (before, renormalised). Bias in logit space, for selection only.
    """

    takes_bias = True

    def __init__(self, hidden_size: int, num_experts: int, options: SoftmaxTopKOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts)
        self.options = options or SoftmaxTopKOptions()
        check_top_k_fits(self.options.top_k, num_experts)
        check_groups_fit(num_experts, self.options.top_k, self.options.num_groups, self.options.groups_per_token)
        self.max_k = self.options.top_k

    @property
    def weight_sum(self) -> float | None:
        return self.options.scaling if self.options.sums_to_one else None

    def forward(
        self,
        tokens_TH: Tensor,
        batch: TokenBatch,
        *,
        bias_E: Tensor | None = None,
        replay_TE: Tensor | None = None,
    ) -> Routing:
        logits_TE = self.logits(tokens_TH)
        # Detached, so that recomputation, which has its selection already, keeps as many tensors as the first pass.
        scores_TE = logits_TE.detach() if bias_E is None else logits_TE.detach() + bias_E
        options = self.options
        if replay_TE is None and options.groups_per_token < options.num_groups:
            reached_TE = in_best_groups(scores_TE, options.num_groups, options.groups_per_token, best=1)
            scores_TE = scores_TE.masked_fill(~reached_TE, -torch.inf)
        selected_TE, experts_TK = select_top_k(scores_TE, options.top_k, batch.padding_T, replay_TE)
        probs_TE = torch.softmax(logits_TE, dim=-1)
        if options.sums_to_one:
            weights_TE = softmax_over(logits_TE, selected_TE)
        else:
            weights_TE = probs_TE * selected_TE
        return Routing(
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            weights_TE=weights_TE * options.scaling,
            selected_TE=selected_TE,
            kept_TE=selected_TE,
            experts_TK=experts_TK,
        )
