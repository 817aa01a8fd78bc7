"""Distances of diagonal Gaussians N(m, v), each of T tokens to each of E prototypes, from means and log variances.

kl, js and hellinger divide by a variance of each pair or expert, so that expanding (m1 - m2)^2 into products of
matrices would lose digits where variances are small: they go over the pairs, in O(T E D) operations and bounded
memory (chunks.py). wasserstein is a plain distance of points in 2 D dimensions, for which the expansion loses
digits only where two points are much nearer to each other than to the origin.

Variances count as at least 1e-6, as in published code. js is taken with a Gaussian in place of the mixture, as there,
which leaves the spread of the means, (m1 - m2)^2 / 4, out of its variance. Published code multiplies the D factors of
Hellinger, each at least 1e-6, where this sums logarithms.

Suffixes: T tokens, D latent, E experts, N and M points.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moe_train.routing.chunks import over_rows

_LEAST_LOGVAR = math.log(1e-6)


def squared_distances(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    """|x - y|^2 of each pair, [..., N, M], in O(N M) memory. Its error is of the order of |x|^2 eps."""
    squares = x_ND.square().sum(-1)[..., :, None] + y_MD.square().sum(-1)[..., None, :]
    return (squares - 2 * x_ND @ y_MD.transpose(-1, -2)).clamp(min=0)


def root(squares: Tensor) -> Tensor:
    """sqrt(x + 1e-6): a distance with a finite gradient where points meet."""
    return torch.sqrt(squares + 1e-6)


def kl_divergence(mean_TD: Tensor, logvar_TD: Tensor, mean_ED: Tensor, logvar_ED: Tensor) -> Tensor:
    """KL(token || prototype) = 1/2 sum_d [log(v2 / v1) + (v1 + (m1 - m2)^2) / v2 - 1], [T, E]."""
    squares_TED = (mean_TD[:, None] - mean_ED).square() * torch.exp(-logvar_ED)
    variances_TE = logvar_TD.exp() @ torch.exp(-logvar_ED).t()
    logarithms_TE = logvar_ED.sum(-1) - logvar_TD.sum(-1)[:, None]
    return 0.5 * (logarithms_TE + variances_TE + squares_TED.sum(-1) - mean_TD.shape[1])


def js_divergence(mean_TD: Tensor, logvar_TD: Tensor, mean_ED: Tensor, logvar_ED: Tensor) -> Tensor:
    """1/2 KL(1 || M) + 1/2 KL(2 || M), M = N((m1 + m2) / 2, (v1 + v2) / 2), [T, E].

    With this M it is 1/4 sum_d [2 log((v1 + v2) / 2) - log v1 - log v2 + (m1 - m2)^2 / (v1 + v2)], which is the
    Bhattacharyya distance: js and hellinger rank experts alike.
    """
    total_TED = torch.logaddexp(logvar_TD[:, None], logvar_ED)
    pairs_TE = (2 * total_TED + (mean_TD[:, None] - mean_ED).square() * torch.exp(-total_TED)).sum(-1)
    constant = 2 * math.log(2) * mean_TD.shape[1]
    return 0.25 * (pairs_TE - constant - logvar_TD.sum(-1)[:, None] - logvar_ED.sum(-1)).clamp(min=0)


def hellinger_distance(mean_TD: Tensor, logvar_TD: Tensor, mean_ED: Tensor, logvar_ED: Tensor) -> Tensor:
    """sqrt(1 - prod_d sqrt(2 sqrt(v1 v2) / (v1 + v2)) exp(-(m1 - m2)^2 / (4 (v1 + v2)))), [T, E], in [0, 1]."""
    js_TE = js_divergence(mean_TD, logvar_TD, mean_ED, logvar_ED)
    return torch.sqrt(-torch.expm1(-js_TE) + 1e-12)  # the product is exp(-js); finite gradient at 0


def wasserstein_distance(mean_TD: Tensor, logvar_TD: Tensor, mean_ED: Tensor, logvar_ED: Tensor) -> Tensor:
    """sqrt(|m1 - m2|^2 + |sqrt(v1) - sqrt(v2)|^2 + 1e-6), the 2-Wasserstein distance, [T, E]."""
    points = (torch.cat([mean, torch.exp(0.5 * v)], -1) for mean, v in ((mean_TD, logvar_TD), (mean_ED, logvar_ED)))
    return root(squared_distances(*points))


GAUSSIAN_DISTANCES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "kl": kl_divergence,
    "js": js_divergence,
    "hellinger": hellinger_distance,
    "wasserstein": wasserstein_distance,
}


def gaussian_distances(kind: str, mean_TD: Tensor, logvar_TD: Tensor, mean_ED: Tensor, logvar_ED: Tensor) -> Tensor:
    """[T, E] by one of ``GAUSSIAN_DISTANCES``."""
    rows = (mean_TD, logvar_TD.clamp(min=_LEAST_LOGVAR))
    others = (mean_ED, logvar_ED.clamp(min=_LEAST_LOGVAR))
    per_row = mean_ED.shape[0] * (1 if kind == "wasserstein" else mean_ED.shape[1])
    return over_rows(GAUSSIAN_DISTANCES[kind], rows, others, per_row)
