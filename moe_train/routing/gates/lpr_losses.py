"""KL and alignment of latent prototype routing. Each returns a LossTerm; its coefficient is not in its sum.

Where the published code differs: it counts padding, and adds all terms once per micro-batch without dividing by the
number of micro-batches (``reg_scale``). The alignment: see there.

Suffixes: T tokens, D latent, E experts, G token sets (scopes.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.routing.interface import LossTerm
from moe_train.routing.scopes import TokenSets


def kl_to_standard_normal(mu_TD: Tensor, logvar_TD: Tensor, sets: TokenSets, coefficient: float) -> LossTerm:
    """KL(N(mu, exp(logvar)) || N(0, 1)) summed over D, mean over the tokens of each set."""
    kl_T = 0.5 * (mu_TD.square() + logvar_TD.exp() - 1 - logvar_TD).sum(dim=-1)
    return sets.term_of_means(sets.sums(kl_T[:, None])[:, 0], coefficient)


def published_shares(logits_TE: Tensor, selected_TE: Tensor) -> Tensor:
    """Softmax over ALL experts of the scores of the selected ones and zeros for the others, [T, E]: an unselected
    expert takes part with exp(0). With cosines, 8 of 128 experts, nine tenths of the mass are there."""
    return torch.softmax(torch.where(selected_TE, logits_TE, 0.0), dim=-1)


def prototype_alignment(
    prototypes_ED: Tensor,
    shares_TE: Tensor,
    latents_TD: Tensor,
    sets: TokenSets,
    layer: int,
    coefficient: float,
    *,
    averaged: bool,
) -> LossTerm:
    """mean over E and D of |P_e - T_e|; targets are detached, so that only prototypes learn from it.

    ``averaged``: T_e is the mean of the latents over the set's tokens weighted with their share for e; experts without
    a share in the set add nothing. Otherwise, as published, T_e is the sum, which grows with the number of tokens.
    """
    shares_TE, latents_TD = shares_TE.detach(), latents_TD.detach()
    target_GED, mass_GE = sets.products(shares_TE, latents_TD), sets.sums(shares_TE)
    if sets.scope == "global_batch":
        packed_GED = torch.cat([target_GED, mass_GE[..., None]], dim=-1)
        packed_GED = sets.batch.sum_over_window("lpr_alignment", layer, packed_GED)
        target_GED, mass_GE = packed_GED[..., :-1], packed_GED[..., -1]
    if averaged:
        target_GED = target_GED / mass_GE.clamp(min=torch.finfo(mass_GE.dtype).tiny)[..., None]
    distance_GE = (prototypes_ED - target_GED).abs().mean(dim=-1) * (mass_GE > 0)
    return sets.term(distance_GE.mean(dim=-1), coefficient)
