"""Latent prototype routing: cosine similarity to learned prototypes in a small latent space.

Suffixes: T tokens, H hidden, D latent, E experts, K chosen, G token sets (scopes.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.routing.arithmetic import full_precision, gate_dtype, softmax_over
from moe_train.routing.gates.lpr_losses import (
    kl_to_standard_normal,
    latent_diversity,
    prototype_alignment,
    prototype_diversity,
)
from moe_train.routing.interface import Gate, LossTerm, Routing, TokenBatch
from moe_train.routing.options import Scope
from moe_train.routing.registry import register_gate
from moe_train.routing.scopes import TokenSets
from moe_train.routing.topk import select_top_k


@dataclass(frozen=True)
class LatentPrototypeOptions:
    """Losses enter as coefficient * (diversity_weight * diversity + kl_weight * KL + align_weight * alignment)."""

    top_k: int = 2
    latent_dim: int = 16
    coefficient: float = 0.01
    diversity_weight: float = 1.0
    kl_weight: float = 0.01
    align_weight: float = 0.05
    prototype_init: Literal["normal", "hypersphere"] = "normal"
    """normal: every element from N(0, 1); hypersphere: rows of that scaled to norm 1."""
    scope: Scope = "sequence"
    """Token set of the diversity of latents, of the KL and of the alignment."""

    def __post_init__(self) -> None:
        for name in ("top_k", "latent_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("coefficient", "diversity_weight", "kl_weight", "align_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")


@register_gate("lpr", LatentPrototypeOptions)
class LatentPrototypeGate(Gate):
    """a = SiLU(LayerNorm(x)); (mu, logvar) = W_enc a + b_enc; s_e = cos(mu, P_e); the k largest s + bias; weights =
    softmax of the selected raw scores; experts see x + W_dec (softmax_E(s) P) + b_dec.

    Shapes: x [T, H], ``prototypes`` [E, D], ``encoder`` [2D, H], ``decoder`` [H, D]. Time O(T D (H + E)), memory
    O(T (H + E)). The latent sample z = mu + exp(logvar / 2) * noise of the method is not drawn: scores use mu, and so
    does the alignment target here, so that it would reach nothing; logvar learns from the KL alone. Losses and where
    they differ from the published code: lpr_losses.py. Source: Yang 2025 (arXiv 2506.21328).
    """

    takes_bias = True
    expert_rows = ("prototypes",)
    shift_parameters = ("decoder.weight", "decoder.bias")
    weight_sum = 1.0

    def __init__(self, hidden_size: int, num_experts: int, options: LatentPrototypeOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts)
        self.options = options or LatentPrototypeOptions()
        if self.options.top_k > num_experts:
            raise ValueError(f"top_k is {self.options.top_k}, but there are only {num_experts} experts")
        self.max_k = self.options.top_k
        latent = self.options.latent_dim
        self.norm = nn.LayerNorm(hidden_size)
        self.encoder = nn.Linear(hidden_size, 2 * latent)
        self.decoder = nn.Linear(latent, hidden_size)
        self.prototypes = nn.Parameter(torch.empty(num_experts, latent))
        for linear in (self.encoder, self.decoder):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            self.prototypes.copy_(self._placed(torch.randn(num_experts, latent)))

    def forward(
        self,
        tokens_TH: Tensor,
        batch: TokenBatch,
        *,
        bias_E: Tensor | None = None,
        replay_TE: Tensor | None = None,
    ) -> Routing:
        dtype = gate_dtype(tokens_TH, self.prototypes)
        with full_precision(tokens_TH):
            mu_TD, logvar_TD = self._encode(tokens_TH.to(dtype))
            prototypes_ED = self.prototypes.to(dtype)
            unit_TD, unit_ED = unit_rows(mu_TD), unit_rows(prototypes_ED)
            logits_TE = F.linear(unit_TD, unit_ED)
            probs_TE = torch.softmax(logits_TE, dim=-1)
            shift_TH = F.linear(probs_TE @ prototypes_ED, self.decoder.weight.to(dtype), self.decoder.bias.to(dtype))
            scores_TE = logits_TE if bias_E is None else logits_TE + bias_E
            selected_TE, experts_TK = select_top_k(scores_TE, self.options.top_k, batch.padding_T, replay_TE)
            weights_TE = softmax_over(logits_TE, selected_TE)
            losses = self._losses(mu_TD, logvar_TD, unit_TD, unit_ED, prototypes_ED, weights_TE, batch)
        return Routing(
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            weights_TE=weights_TE,
            selected_TE=selected_TE,
            kept_TE=selected_TE,
            losses=losses,
            expert_input_shift_TH=shift_TH,
            experts_TK=experts_TK,
        )

    def _encode(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar, each [T, D]."""
        dtype = x_TH.dtype
        norm, encoder = self.norm, self.encoder
        a_TH = F.silu(F.layer_norm(x_TH, (self.hidden_size,), norm.weight.to(dtype), norm.bias.to(dtype), norm.eps))
        mu_TD, logvar_TD = F.linear(a_TH, encoder.weight.to(dtype), encoder.bias.to(dtype)).chunk(2, dim=-1)
        return mu_TD, logvar_TD

    def _losses(
        self,
        mu_TD: Tensor,
        logvar_TD: Tensor,
        unit_TD: Tensor,
        unit_ED: Tensor,
        prototypes_ED: Tensor,
        weights_TE: Tensor,
        batch: TokenBatch,
    ) -> dict[str, LossTerm]:
        """The terms whose coefficient is not 0, without their coefficients."""
        options, sets = self.options, TokenSets(batch, self.options.scope)
        diversity, kl, alignment = (
            options.coefficient * w for w in (options.diversity_weight, options.kl_weight, options.align_weight)
        )
        losses = {}
        if diversity > 0:
            losses["lpr_diversity"] = latent_diversity(unit_TD, sets, self.layer, diversity)
            losses["lpr_prototype_diversity"] = prototype_diversity(unit_ED, sets, diversity)
        if kl > 0:
            losses["lpr_kl"] = kl_to_standard_normal(mu_TD, logvar_TD, sets, kl)
        if alignment > 0:
            losses["lpr_alignment"] = prototype_alignment(prototypes_ED, mu_TD, weights_TE, sets, self.layer, alignment)
        return losses

    def _placed(self, prototypes_ED: Tensor) -> Tensor:
        if self.options.prototype_init == "hypersphere":
            return F.normalize(prototypes_ED, dim=-1)
        return prototypes_ED

    def initial(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        if name != "prototypes":
            return None
        return self._placed(torch.randn(shape, generator=generator))

    def no_decay_parameters(self) -> set[str]:
        return {"prototypes"}


def unit_rows(x_ND: Tensor) -> Tensor:
    """Rows scaled to norm 1. A row of zeros stays zero, with a finite gradient."""
    return x_ND * torch.rsqrt(x_ND.square().sum(dim=-1, keepdim=True) + 1e-12)
