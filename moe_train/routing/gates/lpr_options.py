"""Options of latent prototype routing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_train.routing.options import Scope
from moe_train.routing.schedule import Ramp, bounds

SimilarityKind = Literal[
    "cosine", "cross_attention", "gaussian", "mahalanobis", "dot", "kl", "js", "hellinger", "wasserstein"
]
DiversityKind = Literal["orthogonal", "cosine", "euclidean"]


@dataclass(frozen=True)
class LatentPrototypeOptions:
    """Losses enter as reg_scale * coefficient * (diversity_weight * diversity + kl_weight * KL + align_weight *
    alignment). Coefficient and weights may be ramps over the optimizer steps."""

    top_k: int = 2
    latent_dim: int = 16
    coefficient: float | Ramp = 0.01
    diversity_weight: float | Ramp = 1.0
    kl_weight: float | Ramp = 0.01
    align_weight: float | Ramp = 0.05
    prototype_init: Literal["normal", "hypersphere"] = "normal"
    """normal: every element from N(0, 1); hypersphere: rows of that scaled to norm 1."""
    scope: Scope = "sequence"
    """Token set of the diversity of latents, of the KL and of the alignment."""
    similarity: SimilarityKind = "cosine"
    """Of a latent and a prototype (lpr_similarity.py); kl, js, hellinger and wasserstein are distances of Gaussians,
    and prototypes then have a variance of their own."""
    sigma: float = 1.0
    """Width of the gaussian similarity."""
    diversity: DiversityKind = "orthogonal"
    prototypes: Literal["learned", "frozen", "ema"] = "learned"
    """learned: parameters; frozen: they stay where they began (a control); ema: they follow the latents of their
    tokens, and nothing teaches them by gradient."""
    ema_decay: float = 0.8
    """Weight of the past in ``prototypes: ema``, in [0, 1)."""
    input_shift: bool = True
    """Whether experts see the decoded mixture of prototypes added to their input."""
    mode: Literal["paper", "published"] = "paper"
    """published: target of the alignment, and of averaged prototypes, as published code takes it; see
    ``prototype_alignment``."""
    reg_scale: float = 1.0
    """Factor on all losses. Published runs added them once per micro-batch without dividing by the number of
    micro-batches: 27 in effect for their Qwen3 and Mixtral models, 18 for DeepSeek-V3."""

    def __post_init__(self) -> None:
        for name in ("top_k", "latent_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.top_k == 1 and not self.input_shift:
            raise ValueError(
                "top_k 1 without input_shift gives every weight the value 1, and the language loss reaches the gate no"
                " way: leave input_shift on, or choose a larger top_k"
            )
        for name in ("coefficient", "diversity_weight", "kl_weight", "align_weight", "reg_scale"):
            if not bounds(getattr(self, name))[0] >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not self.sigma > 0:
            raise ValueError(f"sigma is {self.sigma}; it must be above 0")
        if self.sigma != 1.0 and self.similarity != "gaussian":
            raise ValueError(f"sigma is for similarity gaussian, not for {self.similarity}: leave it out")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must be at least 0 and below 1")
        if self.ema_decay != 0.8 and self.prototypes != "ema":
            raise ValueError(f"ema_decay is for prototypes ema, not for {self.prototypes}: leave it out")
        if self.prototypes != "learned" and self.align_weight not in (LatentPrototypeOptions.align_weight, 0):
            raise ValueError(
                "align_weight is for prototypes learned, as only they learn from the alignment, not for"
                f" {self.prototypes}: leave it out"
            )
        if self.prototypes == "frozen" and self.mode != "paper":
            raise ValueError(f"mode {self.mode} is for prototypes that move, not for frozen: leave it out")
        if self.diversity == "euclidean" and self.scope == "global_batch":
            raise ValueError(
                "diversity euclidean needs every pair of tokens, which no sum over ranks gives: choose scope sequence"
                " or micro_batch, or another diversity"
            )
