"""A control without learning: k experts by lot.

Suffixes: T tokens, H hidden, E experts, K chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_train.routing.arithmetic import gate_dtype
from moe_train.routing.interface import Gate, Routing, TokenBatch
from moe_train.routing.registry import register_gate
from moe_train.routing.topk import check_top_k, check_top_k_fits, select_top_k


@dataclass(frozen=True)
class UniformRandomOptions:
    top_k: int = 2

    def __post_init__(self) -> None:
        check_top_k(self.top_k)


@register_gate("uniform_random", UniformRandomOptions)
class UniformRandomGate(Gate):
    """k different experts per token, every set of k equally likely; weights 1/k. No parameters, nothing is learned.

    The lot is a function of (seed, step, layer, sample, position): the same in every layout and in recomputation,
    another one in every step. In evaluation mode the same rule holds, where seed and step are those of the batch (0 in
    generation and in exports), so a token's experts follow from its place alone. Shapes: weights [T, E]; logits are 0
    and probabilities 1/E, so that no balancing piece makes sense. Time and memory O(T E). Source: the random baseline
    of Zuo et al. 2021 (THOR, arXiv 2110.04260), there one lot for all tokens of a batch, here one for each token.
    """

    reads_hidden = False
    takes_switch_loss = False
    takes_z_loss = False
    ties = "none"
    weight_sum = 1.0

    def __init__(self, hidden_size: int, num_experts: int, options: UniformRandomOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts)
        self.options = options or UniformRandomOptions()
        check_top_k_fits(self.options.top_k, num_experts)
        self.max_k = self.options.top_k

    def forward(
        self,
        tokens_TH: Tensor,
        batch: TokenBatch,
        *,
        bias_E: Tensor | None = None,
        replay_TE: Tensor | None = None,
    ) -> Routing:
        assert bias_E is None, "uniform_random takes no bias"
        # The k largest of independent, equally distributed numbers are every set of k with the same probability.
        noise_TE = batch.noise("uniform_random", self.layer, (self.num_experts,))
        selected_TE, experts_TK = select_top_k(noise_TE, self.options.top_k, batch.padding_T, replay_TE)
        logits_TE = noise_TE.new_zeros(noise_TE.shape, dtype=gate_dtype(tokens_TH))
        return Routing(
            logits_TE=logits_TE,
            probs_TE=logits_TE + 1 / self.num_experts,
            weights_TE=selected_TE.to(logits_TE.dtype) / self.options.top_k,
            selected_TE=selected_TE,
            kept_TE=selected_TE,
            experts_TK=experts_TK,
        )
