"""SimBal: the plain softmax gate, kept near-orthogonal so that similar tokens have similar scores.

Suffixes: T tokens, H hidden, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_train.routing.arithmetic import full_precision, gate_dtype
from moe_train.routing.gates.softmax_topk import SoftmaxTopKGate, SoftmaxTopKOptions
from moe_train.routing.interface import LossTerm, Routing, TokenBatch
from moe_train.routing.registry import register_gate
from moe_train.routing.schedule import Ramp, bounds, value_at
from moe_train.routing.scopes import TokenSets


@dataclass(frozen=True)
class SimBalOptions(SoftmaxTopKOptions):
    coefficient: float | Ramp = 0.1
    """Coefficient of the loss; a number or a ramp."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not bounds(self.coefficient)[0] >= 0:
            raise ValueError(f"coefficient is {self.coefficient}; it must not be negative")


@register_gate("simbal", SimBalOptions)
class SimBalGate(SoftmaxTopKGate):
    """softmax_topk, whose ``weight`` [E, H] starts with orthonormal rows, with the loss sum over all E^2 entries of
    |R^T R - I|, R = weight^T [H, E].

    An orthonormal R keeps the products of tokens inside its span, so that similar tokens stay similar in the scores.
    The loss belongs to the weights: no token enters it, and it counts once per step whatever the split. It is 0 exactly
    where the rows are orthonormal, with a gradient of constant size elsewhere; that takes E <= H (with more experts
    than H the start is a scaled tight frame, and the loss cannot reach 0). Time O(E^2 H) per micro-batch besides
    softmax_topk's, memory O(E^2). Source: Omi, Sen, Farhadi 2025 (arXiv 2506.14038): loss and orthogonal start; the
    norm is read as the sum over entries.
    """

    balance_options = ("coefficient",)
    options: SimBalOptions

    def __init__(self, hidden_size: int, num_experts: int, options: SimBalOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options or SimBalOptions())
        nn.init.orthogonal_(self.weight)

    def forward(
        self,
        tokens_TH: Tensor,
        batch: TokenBatch,
        *,
        bias_E: Tensor | None = None,
        replay_TE: Tensor | None = None,
    ) -> Routing:
        routing = super().forward(tokens_TH, batch, bias_E=bias_E, replay_TE=replay_TE)
        if bounds(self.options.coefficient)[1] > 0:
            with full_precision(tokens_TH):
                weight_EH = self.weight.to(gate_dtype(tokens_TH, self.weight))
                routing.losses["simbal"] = orthogonality(
                    weight_EH, batch, value_at(self.options.coefficient, batch.step)
                )
        return routing

    def initial(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        return nn.init.orthogonal_(torch.empty(shape), generator=generator)


def orthogonality(weight_EH: Tensor, batch: TokenBatch, coefficient: float) -> LossTerm:
    """Sum of |weight weight^T - I|, weighted with the tokens of the micro-batch, so that it counts once per step."""
    gram_EE = weight_EH @ weight_EH.t()
    identity_EE = torch.eye(len(gram_EE), dtype=gram_EE.dtype, device=gram_EE.device)
    return TokenSets(batch, "global_batch").term((gram_EE - identity_EE).abs().sum().view(1), coefficient)
