"""DeepSeek-V3's gate: a sigmoid per expert, the k largest, optionally inside the best groups of experts.

Suffixes: T tokens, H hidden, E experts, K chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.routing.groups import check_group_options, check_groups_fit, in_best_groups
from moe_train.routing.interface import Routing, TokenBatch
from moe_train.routing.linear_gate import LinearGate
from moe_train.routing.registry import register_gate
from moe_train.routing.topk import check_top_k, check_top_k_fits, select_top_k

_TINY = 1e-20
"""Added to the sum that weights are divided by, as in the published model."""


@dataclass(frozen=True)
class SigmoidTopKOptions:
    top_k: int = 2
    renormalize: bool = True
    """Divide the selected scores by their sum."""
    scaling: float = 1.0
    """All combine weights times this, after renormalisation (routed_scaling_factor of the published configuration)."""
    num_groups: int = 1
    """Groups of neighbouring experts, all of one size."""
    groups_per_token: int = 1
    """Groups that a token may choose experts from."""

    def __post_init__(self) -> None:
        check_top_k(self.top_k)
        if not 0 < self.scaling < float("inf"):
            raise ValueError(f"scaling is {self.scaling}; it must be above 0 and finite")
        check_group_options(self.num_groups, self.groups_per_token)
        if self.top_k == 1 and self.renormalize:
            raise ValueError(
                "top_k 1 with renormalize gives every weight the value of scaling and the gate no gradient:"
                " set renormalize: false, or a larger top_k"
            )


@register_gate("sigmoid_topk", SigmoidTopKOptions)
class SigmoidTopKGate(LinearGate):
    """s = sigmoid(W x); the k experts with the largest s + bias; weights scaling * s_e / (sum of the selected s +
    1e-20), or scaling * s_e without ``renormalize``. The bias decides the selection and enters no weight.

    With ``num_groups`` above 1 only experts of the ``groups_per_token`` best groups can be selected: the score of a
    group is the sum of its two largest s + bias (a group of one expert: of that one). Ties, also of groups, go to the
    lower index. ``probs_TE`` is s_e / sum over all experts of s. Shapes: x [T, H], ``weight`` [E, H], logits (W x),
    probabilities and weights [T, E]. Time O(T E H), memory O(T E). ValueError where groups do not divide the experts
    or hold fewer than k of them. Sources: DeepSeek-V3 (arXiv 2412.19437), eq. 12 to 16, and 19 for ``probs_TE``;
    Wang et al. 2024 (arXiv 2408.15664) for the bias; groups as in the published model.
    """

    takes_bias = True
    weights_vanish = True

    def __init__(self, hidden_size: int, num_experts: int, options: SigmoidTopKOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts)
        self.options = options = options or SigmoidTopKOptions()
        check_top_k_fits(self.options.top_k, num_experts)
        check_groups_fit(num_experts, options.top_k, options.num_groups, options.groups_per_token)
        self.max_k = options.top_k

    @property
    def weight_sum(self) -> float | None:
        return self.options.scaling if self.options.renormalize else None

    def forward(
        self,
        tokens_TH: Tensor,
        batch: TokenBatch,
        *,
        bias_E: Tensor | None = None,
        replay_TE: Tensor | None = None,
    ) -> Routing:
        logits_TE = self.logits(tokens_TH)
        scores_TE = torch.sigmoid(logits_TE)
        ranked_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
        options = self.options
        if replay_TE is None and options.groups_per_token < options.num_groups:
            reached_TE = in_best_groups(ranked_TE, options.num_groups, options.groups_per_token, best=2)
            ranked_TE = ranked_TE.masked_fill(~reached_TE, -torch.inf)
        selected_TE, experts_TK = select_top_k(ranked_TE, options.top_k, batch.padding_T, replay_TE)
        weights_TE = scores_TE * selected_TE
        if options.renormalize:
            weights_TE = weights_TE / (weights_TE.sum(dim=-1, keepdim=True) + _TINY)
        return Routing(
            logits_TE=logits_TE,
            # s_e / sum of all s, finite also where every sigmoid underflows.
            probs_TE=torch.softmax(F.logsigmoid(logits_TE), dim=-1),
            weights_TE=weights_TE * options.scaling,
            selected_TE=selected_TE,
            kept_TE=selected_TE,
            experts_TK=experts_TK,
        )
