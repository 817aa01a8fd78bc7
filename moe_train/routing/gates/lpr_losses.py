"""Losses of latent prototype routing. Each returns a LossTerm; its coefficient is not in its sum.

Where the published code differs: it counts padding, takes the alignment target as a sum over tokens (growing with
their number), lets unselected experts take part in it with exp(0), and adds all terms once per micro-batch.

Suffixes: T tokens, D latent, E experts, G token sets (scopes.py), M tokens of a set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.routing.interface import LossTerm
from moe_train.routing.scopes import TokenSets


def frame_potential(gram_GDD: Tensor, tokens_G: Tensor) -> Tensor:
    """Mean over all M^2 entries of (U U^T - I)^2 for unit rows U [M, D], from U^T U: (|U^T U|_F^2 - M) / M^2, [G].

    Exact, in O(M D^2) instead of O(M^2 D). At least 1/D - 1/M where M > D (Welch bound).
    """
    tokens_G = tokens_G.clamp(min=1).to(gram_GDD.dtype)
    return (gram_GDD.square().sum(dim=(1, 2)) - tokens_G) / tokens_G.square()


def latent_diversity(unit_TD: Tensor, sets: TokenSets, layer: int, coefficient: float) -> LossTerm:
    """Frame potential of the tokens' latent directions, per token set."""
    gram_GDD = sets.products(unit_TD, unit_TD)
    if sets.scope != "global_batch":
        return sets.term(frame_potential(gram_GDD, sets.tokens_G), coefficient)
    tokens = sets.tokens_G.sum()
    # One collective: the count travels with the matrix. Exact in float32 to 2^24 tokens, in float64 beyond.
    packed = torch.cat([gram_GDD.detach().flatten().double(), tokens.double().view(1)])
    packed = sets.batch.sum_over_window("lpr_diversity", layer, packed)
    window_DD, window_tokens = packed[:-1].view_as(gram_GDD[0]).to(gram_GDD.dtype), packed[-1].to(gram_GDD.dtype)
    # (|C|^2 - M) / M^2 with C the sum over ranks. Linear in this rank's part of C: the value is that of the sum,
    # the gradient 2 C / M^2. Its unit is the token, hence one M less below.
    own = (window_DD * gram_GDD[0]).sum()
    return LossTerm((2 * own - own.detach() - tokens) / window_tokens.clamp(min=1), tokens, "token", coefficient)


def prototype_diversity(unit_ED: Tensor, sets: TokenSets, coefficient: float) -> LossTerm:
    """Frame potential of the prototypes; every token set has the same, so that it counts once per step."""
    experts_G = torch.full_like(sets.tokens_G, unit_ED.shape[0])
    value_1 = frame_potential((unit_ED.t() @ unit_ED)[None], experts_G[:1])
    return sets.term(value_1.expand(experts_G.shape), coefficient)


def kl_to_standard_normal(mu_TD: Tensor, logvar_TD: Tensor, sets: TokenSets, coefficient: float) -> LossTerm:
    """KL(N(mu, exp(logvar)) || N(0, 1)) summed over D, mean over the tokens of each set."""
    kl_T = 0.5 * (mu_TD.square() + logvar_TD.exp() - 1 - logvar_TD).sum(dim=-1)
    return sets.term_of_means(sets.sums(kl_T[:, None])[:, 0], coefficient)


def prototype_alignment(
    prototypes_ED: Tensor, mu_TD: Tensor, weights_TE: Tensor, sets: TokenSets, layer: int, coefficient: float
) -> LossTerm:
    """mean over E and D of |P_e - T_e|, T_e the mean of mu over the set's tokens weighted with their weight for e.

    Targets are detached, so only prototypes learn from it. Experts without a token in the set add nothing.
    """
    weights_TE, mu_TD = weights_TE.detach(), mu_TD.detach()
    sums_GED, mass_GE = sets.products(weights_TE, mu_TD), sets.sums(weights_TE)
    if sets.scope == "global_batch":
        packed_GED = torch.cat([sums_GED, mass_GE[..., None]], dim=-1)
        packed_GED = sets.batch.sum_over_window("lpr_alignment", layer, packed_GED)
        sums_GED, mass_GE = packed_GED[..., :-1], packed_GED[..., -1]
    tiny = torch.finfo(mass_GE.dtype).tiny
    target_GED = sums_GED / mass_GE.clamp(min=tiny)[..., None]
    distance_GE = (prototypes_ED - target_GED).abs().mean(dim=-1) * (mass_GE > 0)
    return sets.term(distance_GE.mean(dim=-1), coefficient)
