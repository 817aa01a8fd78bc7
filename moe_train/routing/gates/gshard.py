"""GShard's top-2 routing: the second expert is taken by chance, by a threshold, always or never.

Suffixes: T tokens, H hidden, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_train.routing.arithmetic import softmax_over
from moe_train.routing.interface import Routing, TokenBatch
from moe_train.routing.linear_gate import LinearGate
from moe_train.routing.registry import register_gate
from moe_train.routing.topk import mask_of, slots, top_k


@dataclass(frozen=True)
class GShardOptions:
    second: Literal["random", "threshold", "all", "none"] = "random"
    """When a training token gets its second expert; see GShardGate."""
    second_in_evaluation: Literal["threshold", "all", "none"] = "all"
    """The same in evaluation, where nothing is left to chance."""
    threshold: float = 0.5
    """random: the second expert's share g2 from which on it is always taken (0.5: the paper's probability 2 g2; 0.2:
    the published code's default); threshold: what g2 must exceed."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it must be above 0 and at most 1")
        if "threshold" in (self.second, self.second_in_evaluation) and self.threshold >= 0.5:
            raise ValueError(
                f"threshold is {self.threshold}, but the second expert's share never exceeds 0.5: set a threshold below"
                " that, such as 0.2, or second: none"
            )


@register_gate("gshard", GShardOptions)
class GShardGate(LinearGate):
    """p = softmax(W x); the two experts with the largest W x + bias, g1 = p1 / (p1 + p2) and g2 = p2 / (p1 + p2); the
    first is always selected with weight g1; the second with weight g2,

    - ``random``: with probability min(1, g2 / threshold), drawn from the token's own noise;
    - ``threshold``: where g2 > threshold; ``all``: always; ``none``: never.

    The weights are normalised over both BEFORE the second is dropped, and not again after, in the paper as in the
    published code: a token without its second expert keeps weight g1 < 1, so that its output is smaller and ``none``
    still has a gradient. Shapes: x [T, H], ``weight`` [E, H] (normal, std 0.02), logits, probabilities and weights
    [T, E]. Time O(T E H), memory O(T E). Source: Lepikhin et al. 2020 (arXiv 2006.16668), algorithm 1: probability
    2 g2. Mesh TensorFlow, which system 004 carries along, takes min(1, g2 / 0.2) in training and evaluation alike; the
    paper says nothing of evaluation. Its loss counts first choices only; our switch loss counts all that are selected.
    """

    takes_bias = True

    def __init__(self, hidden_size: int, num_experts: int, options: GShardOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts)
        self.options = options or GShardOptions()
        if num_experts < 2:
            raise ValueError(f"gshard chooses among two experts; there is only {num_experts}")
        # A second place that is never taken would count in capacity, active parameters and FLOPs.
        self.max_k = 1 if self.options.second == self.options.second_in_evaluation == "none" else 2

    @property
    def varies_k(self) -> bool:  # type: ignore[override]
        return self.max_k == 2 and not self.options.second == self.options.second_in_evaluation == "all"

    @property
    def weight_sum(self) -> float | None:
        return 1.0 if self.options.second == self.options.second_in_evaluation == "all" else None

    def forward(
        self,
        tokens_TH: Tensor,
        batch: TokenBatch,
        *,
        bias_E: Tensor | None = None,
        replay_TE: Tensor | None = None,
    ) -> Routing:
        logits_TE = self.logits(tokens_TH)
        scores_TE = logits_TE if bias_E is None else logits_TE + bias_E
        experts_TK = top_k(scores_TE, 2, among_TE=replay_TE)
        if replay_TE is None:
            pair_TE = mask_of(experts_TK, self.num_experts)
            shares_TE = softmax_over(logits_TE, pair_TE)
            second_T = self._takes_second(torch.gather(shares_TE.detach(), 1, experts_TK[:, 1:])[:, 0], batch)
            taken_TK = torch.stack([torch.ones_like(second_T), second_T], dim=1) & ~batch.padding_T[:, None]
            selected_TE = torch.zeros_like(pair_TE).scatter(1, experts_TK, taken_TK)
        else:
            selected_TE = replay_TE
            shares_TE = softmax_over(logits_TE, self._pair_of(scores_TE, replay_TE))
        return Routing(
            logits_TE=logits_TE,
            probs_TE=torch.softmax(logits_TE, dim=-1),
            weights_TE=shares_TE * selected_TE,
            selected_TE=selected_TE,
            kept_TE=selected_TE,
            experts_TK=slots(experts_TK[:, : self.max_k], selected_TE),
        )

    def _takes_second(self, share_T: Tensor, batch: TokenBatch) -> Tensor:
        """bool [T] from g2."""
        policy = self.options.second if self.training else self.options.second_in_evaluation
        if policy == "random":
            # A noise number through its own distribution function is uniform; in float64 (float32 has 0 below -5.5)
            # never 0, so that share 0 never wins.
            uniform_T = torch.special.ndtr(batch.noise("gshard_second", self.layer, ()).double())
            return uniform_T <= share_T / self.options.threshold
        if policy == "threshold":
            return share_T > self.options.threshold
        return torch.full_like(share_T, policy == "all", dtype=torch.bool)

    def _pair_of(self, scores_TE: Tensor, replay_TE: Tensor) -> Tensor:
        """bool [T, E]: the replayed experts and, where that is one, the best of the others: the pair that the first
        pass saw."""
        other_TE = mask_of(top_k(scores_TE, 1, among_TE=~replay_TE), self.num_experts)
        return replay_TE | (other_TE & (replay_TE.sum(dim=1, keepdim=True) == 1))
