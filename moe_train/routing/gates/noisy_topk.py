"""Noisy top-k routing: learned noise on the scores, importance and load losses.

Suffixes: T tokens, H hidden, E experts, K chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.routing.arithmetic import full_precision, gate_dtype, softmax_over
from moe_train.routing.balancing import importance_loss
from moe_train.routing.gates.noisy_topk_load import selection_probability
from moe_train.routing.interface import Gate, LossTerm, Routing, TokenBatch
from moe_train.routing.options import Scope
from moe_train.routing.registry import register_gate
from moe_train.routing.schedule import Ramp, bounds, value_at
from moe_train.routing.scopes import TokenSets
from moe_train.routing.topk import check_top_k, check_top_k_fits, select_top_k, top_k


@dataclass(frozen=True)
class NoisyTopKOptions:
    top_k: int = 2
    importance: float | Ramp = 0.1
    """Coefficient of the squared coefficient of variation of the experts' weights."""
    load: float | Ramp = 0.1
    """Coefficient of the same of the experts' smooth loads."""
    scope: Scope = "sequence"
    """Token set of both losses."""

    def __post_init__(self) -> None:
        check_top_k(self.top_k)
        if self.top_k == 1:
            raise ValueError(
                "top_k 1 gives every weight the value 1 and the gate no gradient from the language loss: set a larger"
                " top_k, or take gate switch"
            )
        for name in ("importance", "load"):
            if not bounds(getattr(self, name))[0] >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")


@register_gate("noisy_topk", NoisyTopKOptions)
class NoisyTopKGate(Gate):
    """H = W x + N * softplus(W_noise x), N standard normal for every token and expert; the k experts with the largest
    H + bias; weights = softmax of the selected H. In evaluation H = W x.

    Losses, per token set: CV^2 of importance_e = sum of the weights of e, and, in training, CV^2 of load_e = sum of
    P_e, the probability that e is selected when its own noise is drawn anew (noisy_topk_load.py). CV^2 is taken with
    the population's variance: 0, with gradient 0, at perfect balance. ``logits_TE`` and ``probs_TE`` (W x and its
    softmax) are without noise. Shapes: x [T, H], ``weight`` and ``noise_weight`` [E, H], both zero at the start, as in
    the paper: pure noise. Time O(T E H), memory O(T E). Source: Shazeer et al. 2017 (arXiv 1701.06538), eq. 3 to 11.
    Published code (tensor2tensor) adds 0.01 to the noise's scale, which the paper does not.
    """

    takes_bias = True
    ties = "none"
    evaluation_ties = "expert"
    balance_options = ("importance", "load")
    expert_rows = ("weight", "noise_weight")
    weight_sum = 1.0

    def __init__(self, hidden_size: int, num_experts: int, options: NoisyTopKOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts)
        self.options = options or NoisyTopKOptions()
        check_top_k_fits(self.options.top_k, num_experts)
        if self.options.top_k == num_experts and bounds(self.options.load)[1] > 0:
            raise ValueError(f"top_k is {num_experts}, all experts: there is no load to balance, set load: 0")
        self.max_k = self.options.top_k
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size))
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, hidden_size))

    def forward(
        self,
        tokens_TH: Tensor,
        batch: TokenBatch,
        *,
        bias_E: Tensor | None = None,
        replay_TE: Tensor | None = None,
    ) -> Routing:
        dtype = gate_dtype(tokens_TH, self.weight)
        scale_TE: Tensor | None = None
        with full_precision(tokens_TH):
            x_TH = tokens_TH.to(dtype)
            logits_TE = noisy_TE = F.linear(x_TH, self.weight.to(dtype))
            if self.training:
                scale_TE = F.softplus(F.linear(x_TH, self.noise_weight.to(dtype)))
                noise_TE = batch.noise("noisy_topk", self.layer, (self.num_experts,))
                noisy_TE = logits_TE + noise_TE.to(dtype) * scale_TE
        scores_TE = noisy_TE if bias_E is None else noisy_TE + bias_E
        selected_TE, experts_TK = select_top_k(scores_TE, self.options.top_k, batch.padding_T, replay_TE)
        weights_TE = softmax_over(noisy_TE, selected_TE)
        return Routing(
            logits_TE=logits_TE,
            probs_TE=torch.softmax(logits_TE, dim=-1),
            weights_TE=weights_TE,
            selected_TE=selected_TE,
            kept_TE=selected_TE,
            losses=self._losses(weights_TE, logits_TE, scores_TE, scale_TE, bias_E, batch),
            experts_TK=experts_TK,
        )

    def _losses(
        self,
        weights_TE: Tensor,
        logits_TE: Tensor,
        scores_TE: Tensor,
        scale_TE: Tensor | None,
        bias_E: Tensor | None,
        batch: TokenBatch,
    ) -> dict[str, LossTerm]:
        """The terms whose coefficient is not 0; without noise (``scale_TE`` None) there is no load."""
        options, sets = self.options, TokenSets(batch, self.options.scope)
        amounts_TE: dict[str, Tensor] = {}
        if bounds(options.importance)[1] > 0:
            amounts_TE["importance"] = weights_TE
        if bounds(options.load)[1] > 0 and scale_TE is not None:
            best_TK = top_k(scores_TE, options.top_k + 1)
            clean_TE = logits_TE if bias_E is None else logits_TE + bias_E
            amounts_TE["load"] = selection_probability(clean_TE, scores_TE, scale_TE, best_TK)
        losses = {}
        for kind, x_TE in amounts_TE.items():
            name, coefficient = f"noisy_topk_{kind}", value_at(getattr(options, kind), batch.step)
            losses[name] = importance_loss(x_TE, sets, self.layer, coefficient, name)
        return losses

    def initial(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        return torch.zeros(shape)
