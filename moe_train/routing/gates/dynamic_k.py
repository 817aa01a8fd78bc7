"""As many experts as it takes to gather a given probability.

Suffixes: T tokens, H hidden, E experts, K slots (max_k, or E).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.routing.arithmetic import softmax_over
from moe_train.routing.interface import Routing, TokenBatch
from moe_train.routing.linear_gate import LinearGate
from moe_train.routing.registry import register_gate
from moe_train.routing.schedule import Ramp, bounds
from moe_train.routing.topk import slots, top_k

_ONE = 2**52
"""The probability 1 in the unit that sums are taken in; exact for float32 probabilities from 2^-29 on."""


@dataclass(frozen=True)
class DynamicKOptions:
    threshold: float | Ramp = 0.8
    """Probability that the chosen experts must gather, in (0, 1]; 1 takes every expert. A ramp counts the optimizer
    steps taken, so that evaluation, a resumed run and an exported model have the threshold of their step."""
    min_k: int = 1
    max_k: int | None = None
    """Bound on experts per token; null means all of them."""
    mode: Literal["paper", "published"] = "paper"
    """published: one expert fewer (but at least one), as published code has it; see the gate."""

    def __post_init__(self) -> None:
        lowest, highest = bounds(self.threshold)
        if not (lowest > 0 and highest <= 1):
            raise ValueError(f"threshold is {self.threshold}; it must be above 0 and at most 1")
        if self.min_k < 1:
            raise ValueError(f"min_k is {self.min_k}; it must be at least 1")
        if self.max_k is not None and self.max_k < self.min_k:
            raise ValueError(f"max_k is {self.max_k}; it must not be below min_k, which is {self.min_k}")
        if self.max_k == 1:
            raise ValueError("max_k 1 gives every weight the value 1 and the gate no gradient: choose a larger one")


@register_gate("dynamic_k", DynamicKOptions)
class DynamicKGate(LinearGate):
    """p = softmax(W x); k = min{j : sum of the j largest p >= threshold}, then kept between min_k and max_k; weights
    p_e / sum of the chosen p.

    The rule is exact: expert j by falling p is chosen while the sum of those before it is below the threshold.
    Published code of "dynamic k" compares the sum *with* p_j instead, and forces the first one, which gives
    max(1, k - 1) experts, never all of them, and a gathered probability below the threshold wherever there are two or
    more: ``mode: published``, for comparison with its figures.

    Shapes: x [T, H], ``weight`` [E, H] (normal, std 0.02), logits, probabilities and weights [T, E]. Time
    O(T E (H + log E)), memory O(T E). Without ``max_k`` shapes downstream depend on the data. No bias: the choice is a
    sum of probabilities, not a ranking. State: ``steps_taken`` (int64 [1]) where the threshold is a ramp.
    Source of the choice: Huang et al. 2024 (arXiv 2403.07652), top-p routing; their code weights with p_e itself.
    Dividing by the sum is the rule of the published code of "dynamic k"; a token with one expert then has the weight 1,
    through which the language loss teaches the gate nothing.
    """

    varies_k = True
    weight_sum = 1.0
    state_follows = MappingProxyType({"steps_taken": "steps"})
    steps_taken: Tensor

    def __init__(self, hidden_size: int, num_experts: int, options: DynamicKOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts)
        self.options = options or DynamicKOptions()
        for name in ("min_k", "max_k"):
            value = getattr(self.options, name)
            if value is not None and value > num_experts:
                raise ValueError(f"{name} is {value}, but there are only {num_experts} experts")
        self.max_k = self.options.max_k
        if isinstance(self.options.threshold, Ramp):
            self.register_buffer("steps_taken", torch.zeros(1, dtype=torch.int64))

    def forward(
        self,
        tokens_TH: Tensor,
        batch: TokenBatch,
        *,
        bias_E: Tensor | None = None,
        replay_TE: Tensor | None = None,
    ) -> Routing:
        assert bias_E is None, "dynamic_k takes no bias"
        logits_TE = self.logits(tokens_TH)
        probs_TE = torch.softmax(logits_TE, dim=-1)
        bound = self.num_experts if self.max_k is None else self.max_k
        selected_TE, experts_TK = replay_TE, None
        if replay_TE is None or self.max_k is not None:
            experts_TK = top_k(logits_TE, bound, among_TE=replay_TE)
        if selected_TE is None:
            assert experts_TK is not None
            selected_TE = self._select(probs_TE, experts_TK) & ~batch.padding_T[:, None]
        return Routing(
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            weights_TE=softmax_over(logits_TE, selected_TE),
            selected_TE=selected_TE,
            kept_TE=selected_TE,
            experts_TK=None if self.max_k is None or experts_TK is None else slots(experts_TK, selected_TE),
        )

    def _select(self, probs_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """bool [T, E] from the experts by falling probability."""
        # In integers, so that no rounding of the sum decides, and the same on every device.
        probs_TK = (torch.gather(probs_TE.detach(), 1, experts_TK).double() * _ONE).round().long()
        sums_TK = probs_TK.cumsum(dim=1)
        if self.options.mode == "paper":
            sums_TK = F.pad(sums_TK[:, :-1], (1, 0))  # of those before it
        chosen_TK = sums_TK < self._bound()
        if self.options.mode == "published":
            chosen_TK[:, self.num_experts - 1 :] = False  # all together have 1, which is below no threshold
        chosen_TK[:, : self.options.min_k] = True
        return torch.zeros_like(probs_TE, dtype=torch.bool).scatter(1, experts_TK, chosen_TK)

    def _bound(self) -> int | Tensor:
        """The threshold in the unit of the sums."""
        threshold = self.options.threshold
        # At 1 more than any sum: all of them by definition, where rounded probabilities may already sum to more.
        if not isinstance(threshold, Ramp):
            return math.ceil(threshold * _ONE) if threshold < 1 else 2 * _ONE
        now = threshold.at(self.steps_taken)
        return torch.where(now < 1, (now * _ONE).ceil().long(), 2 * _ONE)

    def after_step(self, sums: dict[str, Tensor]) -> None:
        if isinstance(self.options.threshold, Ramp):
            self.steps_taken += 1
