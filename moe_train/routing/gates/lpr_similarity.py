"""Scores of latents against prototypes.

Suffixes: T tokens, D latent, E experts, N rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.routing.gates.lpr_distances import GAUSSIAN_DISTANCES, gaussian_distances, squared_distances


@dataclass(frozen=True)
class Gaussians:
    """N diagonal Gaussians; without ``logvar_ND`` points."""

    mean_ND: Tensor
    logvar_ND: Tensor | None = None


class CosineSimilarity(nn.Module):
    """m . p / (|m| |p|)."""

    def forward(self, latents: Gaussians, prototypes: Gaussians) -> Tensor:
        """Scores [T, E] of T latents and E prototypes, in their type; so have all of these."""
        return F.linear(unit_rows(latents.mean_ND), unit_rows(prototypes.mean_ND))


class DotSimilarity(nn.Module):
    """m . p."""

    def forward(self, latents: Gaussians, prototypes: Gaussians) -> Tensor:
        return F.linear(latents.mean_ND, prototypes.mean_ND)


class GaussianSimilarity(nn.Module):
    """exp(-|m - p|^2 / (2 sigma^2)), in (0, 1]."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, latents: Gaussians, prototypes: Gaussians) -> Tensor:
        return torch.exp(-squared_distances(latents.mean_ND, prototypes.mean_ND) / (2 * self.sigma**2))


class MahalanobisSimilarity(nn.Module):
    """1 / (1 + sum_d (m_d - p_d)^2 exp(-log_sigma_d)), in (0, 1]; ``log_sigma`` [D] is learned and begins at 0."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.zeros(latent))

    def forward(self, latents: Gaussians, prototypes: Gaussians) -> Tensor:
        scale_D = torch.exp(-0.5 * self.log_sigma.to(latents.mean_ND.dtype))
        return 1 / (1 + squared_distances(latents.mean_ND * scale_D, prototypes.mean_ND * scale_D))


class CrossAttentionSimilarity(nn.Module):
    """RMSNorm(W_q m + b_q) . RMSNorm(W_k p + b_k) / sqrt(D), one head."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(latent, latent), nn.Linear(latent, latent)
        self.query_norm, self.key_norm = nn.RMSNorm(latent, eps=1e-6), nn.RMSNorm(latent, eps=1e-6)
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, latents: Gaussians, prototypes: Gaussians) -> Tensor:
        query_TD = _projected(latents.mean_ND, self.query, self.query_norm)
        key_ED = _projected(prototypes.mean_ND, self.key, self.key_norm)
        return F.linear(query_TD, key_ED) / math.sqrt(query_TD.shape[1])


class DistanceSimilarity(nn.Module):
    """Minus a distance of two Gaussians (lpr_distances.py)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, latents: Gaussians, prototypes: Gaussians) -> Tensor:
        assert latents.logvar_ND is not None and prototypes.logvar_ND is not None
        logvars = latents.logvar_ND, prototypes.logvar_ND
        return -gaussian_distances(self.kind, latents.mean_ND, logvars[0], prototypes.mean_ND, logvars[1])


def build_similarity(kind: str, latent: int, sigma: float) -> nn.Module:
    """The module of a similarity by its name in the options."""
    if kind in GAUSSIAN_DISTANCES:
        return DistanceSimilarity(kind)
    if kind == "gaussian":
        return GaussianSimilarity(sigma)
    if kind == "mahalanobis":
        return MahalanobisSimilarity(latent)
    if kind == "cross_attention":
        return CrossAttentionSimilarity(latent)
    return CosineSimilarity() if kind == "cosine" else DotSimilarity()


def similarity_products(kind: str, latent: int, experts: int) -> int:
    """Multiply-adds of one token in the matrix products of a similarity; js and hellinger go over the pairs element by
    element instead."""
    if kind in ("js", "hellinger"):
        return 0
    points = 2 * latent if kind == "wasserstein" else latent
    return experts * points + (latent * latent if kind == "cross_attention" else 0)


def unit_rows(x_ND: Tensor) -> Tensor:
    """Rows scaled to norm 1. A row of zeros stays zero, with a finite gradient."""
    return x_ND * torch.rsqrt(x_ND.square().sum(dim=-1, keepdim=True) + 1e-12)


def _projected(x_ND: Tensor, linear: nn.Linear, norm: nn.RMSNorm) -> Tensor:
    y_ND = F.linear(x_ND, linear.weight.to(x_ND.dtype), linear.bias.to(x_ND.dtype))
    assert norm.weight is not None
    return F.rms_norm(y_ND, (y_ND.shape[1],), norm.weight.to(y_ND.dtype), norm.eps)
