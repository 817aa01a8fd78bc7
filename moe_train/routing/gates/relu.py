"""ReLU routing (ReMoE): every expert with a positive score, held sparse by an L1 loss whose coefficient adapts.

Suffixes: T tokens, H hidden, E experts, G token sets (scopes.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.routing.interface import LossTerm, Routing, TokenBatch
from moe_train.routing.linear_gate import LinearGate
from moe_train.routing.options import Scope
from moe_train.routing.registry import register_gate
from moe_train.routing.scopes import TokenSets

_LEAST, _MOST = 1e-30, 1e30
"""The coefficient stays between them: from 0 or infinity a factor could not bring it back."""


@dataclass(frozen=True)
class ReLUOptions:
    mean_k: float = 2.0
    """Experts per token, on average, that the coefficient steers to."""
    initial_coefficient: float = 1e-8
    """Coefficient of the L1 loss in the first step."""
    multiplier: float = 1.2
    """What the coefficient is multiplied with, or divided by, after every step."""
    balanced: bool = True
    """Weigh each expert's L1 with its load, which evens out the load; false: plain L1."""
    scope: Scope = "sequence"
    """Token set of that load."""

    def __post_init__(self) -> None:
        if not self.mean_k > 0:
            raise ValueError(f"mean_k is {self.mean_k}; it must be above 0")
        if not _LEAST <= self.initial_coefficient <= _MOST:
            raise ValueError(f"initial_coefficient is {self.initial_coefficient}; it must lie in {_LEAST} to {_MOST}")
        if not 1 <= self.multiplier < float("inf"):
            raise ValueError(f"multiplier is {self.multiplier}; it must be at least 1 (1 keeps the coefficient)")


@register_gate("relu", ReLUOptions)
class ReLUGate(LinearGate):
    """R = ReLU(W x); the selected experts are those with R > 0, any number per token, also none; weights R itself.

    Loss: lambda * mean over tokens of sum_e f_e R_e, with f_e = E / (mean_k T) * (load of e over the T tokens of the
    set), or f = 1 without ``balanced``. After every step taken lambda *= multiplier^sign(load - mean_k * tokens), from
    exact counts: denser than wanted makes it grow. lambda is the buffer ``coefficient`` [1], float32; it is in the
    loss's sum, whose own coefficient is 1. Not for a token's output, nor in evaluation, does lambda matter. Shapes: x
    [T, H], ``weight`` [E, H] (normal, std 0.02: half of the experts are selected at the start), logits and weights
    [T, E]; ``probs_TE`` is R / sum R (1 / E where no score is positive), without gradient, for statistics. Time
    O(T E H), memory O(T E). Shapes downstream depend on the data. Source: Wang et al. 2024 (arXiv 2412.14711): ReLU
    routing, adaptive L1, and its load-balanced form.

    Where it differs: the paper has one lambda for all layers, moved by the sparsity averaged over them; here each layer
    has its own, so that each holds ``mean_k`` by itself. The published code divides by the multiplier also where the
    sparsity is exactly the target; the paper's sign(0) keeps it, and so does this. Its factor 1 / L is in lambda.
    """

    varies_k = True
    takes_switch_loss = False
    takes_z_loss = False
    state_follows = MappingProxyType({"coefficient": "counts"})
    coefficient: Tensor

    def __init__(self, hidden_size: int, num_experts: int, options: ReLUOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts)
        self.options = options or ReLUOptions()
        if self.options.mean_k > num_experts:
            raise ValueError(f"mean_k is {self.options.mean_k}, but there are only {num_experts} experts")
        self.remedies = (
            *(() if self.options.balanced else ("router.options.balanced=true",)),
            "an importance loss of the combine weights (router.balancing.importance_loss: of weights, coefficient 0.1"
            " or more)",
        )
        self.register_buffer("coefficient", torch.full((1,), self.options.initial_coefficient))

    @property
    def mean_k(self) -> float:
        return self.options.mean_k

    def forward(
        self,
        tokens_TH: Tensor,
        batch: TokenBatch,
        *,
        bias_E: Tensor | None = None,
        replay_TE: Tensor | None = None,
    ) -> Routing:
        assert bias_E is None, "relu takes no bias"
        logits_TE = self.logits(tokens_TH)
        selected_TE = (logits_TE > 0) & ~batch.padding_T[:, None] if replay_TE is None else replay_TE
        weights_TE = torch.where(selected_TE, logits_TE, 0.0)
        positive_TE = F.relu(logits_TE.detach())
        total_T1 = positive_TE.sum(dim=1, keepdim=True)
        some_T1 = total_T1 > 0
        return Routing(
            logits_TE=logits_TE,
            probs_TE=torch.where(some_T1, positive_TE / torch.where(some_T1, total_T1, 1.0), 1.0 / self.num_experts),
            weights_TE=weights_TE,
            selected_TE=selected_TE,
            kept_TE=selected_TE,
            losses={"relu_l1": self._l1(weights_TE, selected_TE, batch)},
        )

    def _l1(self, weights_TE: Tensor, selected_TE: Tensor, batch: TokenBatch) -> LossTerm:
        """lambda * sum_e f_e R_e; f is a statistic without gradient, as in the switch loss."""
        sets = TokenSets(batch, self.options.scope)
        mass_GE = sets.sums(weights_TE)
        if self.options.balanced:
            counts_GN = torch.cat([sets.sums(selected_TE.long()), sets.tokens_G[:, None]], dim=1)
            if sets.scope == "global_batch":
                counts_GN = batch.sum_over_window("relu_load", self.layer, counts_GN)
            tokens_G1 = counts_GN[:, -1:].clamp(min=1)
            share_GE = counts_GN[:, :-1].to(mass_GE.dtype) / tokens_G1.to(mass_GE.dtype)
            mass_GE = mass_GE * share_GE * (self.num_experts / self.options.mean_k)
        return sets.term_of_means(mass_GE.sum(1) * self.coefficient.to(mass_GE.dtype), 1.0)

    @torch.no_grad()
    def after_step(self, sums: dict[str, Tensor]) -> None:
        # Whole numbers up to 2^53 are exact in float64.
        excess = torch.sign(sums["load"].sum().double() - sums["tokens"].double() * self.options.mean_k)
        factor = torch.pow(self.options.multiplier, excess).to(self.coefficient.dtype)
        self.coefficient.mul_(factor).clamp_(_LEAST, _MOST)

    def initial(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        return torch.full(shape, self.options.initial_coefficient) if name == "coefficient" else None
