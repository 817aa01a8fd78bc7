"""Switch routing: one expert per token, weighted with its probability.

Suffixes: T tokens, H hidden, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.routing.arithmetic import gate_dtype
from moe_train.routing.interface import Routing, TokenBatch
from moe_train.routing.linear_gate import LinearGate
from moe_train.routing.registry import register_gate
from moe_train.routing.topk import select_top_k


@dataclass(frozen=True)
class SwitchOptions:
    jitter: float = 0.0
    """In training the gate sees every element of x times a number drawn uniformly from 1 - jitter to 1 + jitter."""

    def __post_init__(self) -> None:
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter is {self.jitter}; it must be at least 0 and below 1")


@register_gate("switch", SwitchOptions)
class SwitchGate(LinearGate):
    """p = softmax(W x); the expert with the largest W x + bias; its weight is p_e, not 1, so that the gate learns from
    the language loss.

    With ``jitter`` eps, training replaces x by x * u inside the gate, u uniform in [1 - eps, 1 + eps] for every element
    (the experts see x itself); evaluation never does. Shapes: x [T, H], ``weight`` [E, H] (normal, std 0.02), logits,
    probabilities and weights [T, E]. Time O(T E H), memory O(T E), with jitter also O(T H). Source: Fedus et al. 2021
    (arXiv 2101.03961), eq. 1 and 2 with k = 1, input jitter 0.01 as in its experiments (section 2.4). Its loss is the
    switch loss, its capacity the capacity option: both stand beside the gate.
    """

    takes_bias = True
    max_k = 1

    def __init__(self, hidden_size: int, num_experts: int, options: SwitchOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts)
        self.options = options or SwitchOptions()

    def forward(
        self,
        tokens_TH: Tensor,
        batch: TokenBatch,
        *,
        bias_E: Tensor | None = None,
        replay_TE: Tensor | None = None,
    ) -> Routing:
        seen_TH = tokens_TH
        if self.training and self.options.jitter > 0:
            seen_TH = tokens_TH.to(gate_dtype(tokens_TH)) * self._jitter(batch)
        logits_TE = self.logits(seen_TH)
        scores_TE = logits_TE if bias_E is None else logits_TE + bias_E
        selected_TE, experts_TK = select_top_k(scores_TE, 1, batch.padding_T, replay_TE)
        probs_TE = torch.softmax(logits_TE, dim=-1)
        return Routing(
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            weights_TE=probs_TE * selected_TE,
            selected_TE=selected_TE,
            kept_TE=selected_TE,
            experts_TK=experts_TK,
        )

    def _jitter(self, batch: TokenBatch) -> Tensor:
        """Factors [T, H], uniform between 1 - jitter and 1 + jitter."""
        uniform_TH = torch.special.ndtr(batch.noise("switch_jitter", self.layer, (self.hidden_size,)))
        return 1 + self.options.jitter * (2 * uniform_TH - 1)
