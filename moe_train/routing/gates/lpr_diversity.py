"""How much latents, or prototypes, resemble each other: the diversity losses of latent prototype routing.

With M rows x, u = x / |x|:

- orthogonal: mean over all M^2 entries of (U U^T - I)^2 = (|U^T U|_F^2 - M) / M^2, at least 1/D - 1/M where M > D
  (Welch bound). In O(M D^2) instead of O(M^2 D).
- cosine: mean of u_i . u_j over i != j = (|sum u|^2 - M) / (M (M - 1)), at least -1 / (M - 1). In O(M D).
- euclidean: minus the mean of |x_i - x_j| over i != j. No sum over rows gives it: it goes over all pairs of a token
  set, in O(M^2 D) operations and bounded memory (chunks.py). It has no lower bound: the KL holds the latents, the
  alignment alone the prototypes.

The first two are exact rewritings, and sums over tokens, so that they can be taken over ranks.

Suffixes: T tokens, D latent, E experts, G token sets (scopes.py), M rows of a set, N elements of a statistic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.routing.chunks import over_rows
from moe_train.routing.gates.lpr_distances import root, squared_distances
from moe_train.routing.gates.lpr_options import DiversityKind
from moe_train.routing.gates.lpr_similarity import unit_rows
from moe_train.routing.interface import LossTerm
from moe_train.routing.scopes import TokenSets


def frame_potential(gram_GDD: Tensor, rows_G: Tensor) -> Tensor:
    """orthogonal, [G], from U^T U."""
    return _excess(gram_GDD.flatten(1), rows_G) / rows_G.clamp(min=1)


def mean_cosine(sum_GD: Tensor, rows_G: Tensor) -> Tensor:
    """cosine, [G], from the sum of U; 0 for fewer than two rows."""
    return (_excess(sum_GD, rows_G) / (rows_G - 1).clamp(min=1)).masked_fill(rows_G < 2, 0.0)


def mean_distance(x_MGD: Tensor, valid_MG: Tensor) -> Tensor:
    """Mean of |x_i - x_j| over the pairs i != j of valid rows, [G]; 0 for fewer than two."""
    rows_G = valid_MG.sum(0)
    index_M = torch.arange(x_MGD.shape[0], device=x_MGD.device)
    sums_MG = over_rows(_distances, (x_MGD, valid_MG, index_M), (x_MGD, valid_MG, index_M), valid_MG.numel())
    return sums_MG.sum(0) / (rows_G * (rows_G - 1)).clamp(min=1)


def latent_diversity(kind: DiversityKind, mu_TD: Tensor, sets: TokenSets, layer: int, coefficient: float) -> LossTerm:
    """Of the tokens' latents, per token set. ``euclidean`` has no ``global_batch`` form."""
    if kind == "euclidean":
        return sets.term(-mean_distance(*_by_set(mu_TD, sets)), coefficient)
    unit_TD = unit_rows(mu_TD)
    statistic_GN = sets.products(unit_TD, unit_TD).flatten(1) if kind == "orthogonal" else sets.sums(unit_TD)
    if sets.scope != "global_batch":
        if kind == "cosine":
            return sets.term(mean_cosine(statistic_GN, sets.tokens_G), coefficient)
        return sets.term(frame_potential(statistic_GN, sets.tokens_G), coefficient)
    tokens, own_N = sets.tokens_G.sum(), statistic_GN[0]
    # One collective: the count travels with the statistic. Exact in float32 to 2^24 tokens, in float64 beyond.
    packed = torch.cat([own_N.detach().double(), tokens.double().view(1)])
    packed = sets.batch.sum_over_window("lpr_diversity", layer, packed)
    window_N, window_tokens = packed[:-1].to(own_N.dtype), packed[-1].to(own_N.dtype)
    # |C|^2 with C the sum over ranks, linear in this rank's part of C: the value is that of the sum, the gradient
    # that of |C|^2. Its unit is the token, hence one M less below than above.
    own = (window_N * own_N).sum()
    below = window_tokens if kind == "orthogonal" else window_tokens - 1
    return LossTerm((2 * own - own.detach() - tokens) / below.clamp(min=1), tokens, "token", coefficient)


def prototype_diversity(kind: DiversityKind, prototypes_ED: Tensor, sets: TokenSets, coefficient: float) -> LossTerm:
    """Of the prototypes; every token set has the same, so that it counts once per step."""
    rows_1 = torch.full((1,), prototypes_ED.shape[0], device=prototypes_ED.device)
    if kind == "euclidean":
        valid_E1 = torch.ones_like(prototypes_ED[:, :1], dtype=torch.bool)
        value_1 = -mean_distance(prototypes_ED[:, None], valid_E1)
    elif kind == "cosine":
        value_1 = mean_cosine(unit_rows(prototypes_ED).sum(0)[None], rows_1)
    else:
        unit_ED = unit_rows(prototypes_ED)
        value_1 = frame_potential((unit_ED.t() @ unit_ED)[None], rows_1)
    return sets.term(value_1.expand(sets.tokens_G.shape), coefficient)


def _excess(statistic_GN: Tensor, rows_G: Tensor) -> Tensor:
    """(|C|^2 - M) / M."""
    return (statistic_GN.square().sum(dim=1) - rows_G) / rows_G.clamp(min=1)


def _by_set(x_TD: Tensor, sets: TokenSets) -> tuple[Tensor, Tensor]:
    """[M, G, D], and bool [M, G]: which of them are no padding."""
    batch = sets.batch
    if sets.scope == "sequence":
        return x_TD.view(batch.sequence_length, batch.batch_size, -1), ~batch.padding_T.view(
            batch.sequence_length, batch.batch_size
        )
    return x_TD[:, None], ~batch.padding_T[:, None]


def _distances(
    x_NGD: Tensor, valid_NG: Tensor, index_N: Tensor, y_MGD: Tensor, valid_MG: Tensor, index_M: Tensor
) -> Tensor:
    """[N, G]: for each valid row of x the sum of the distances to all valid rows of y with another index."""
    distances_GNM = root(squared_distances(x_NGD.transpose(0, 1), y_MGD.transpose(0, 1)))
    pairs_GNM = valid_NG.t()[:, :, None] & valid_MG.t()[:, None, :] & (index_N[:, None] != index_M)
    return torch.where(pairs_GNM, distances_GNM, 0.0).sum(-1).t()
