"""Prototypes that follow the latents of their tokens by an exponential moving average.

Published code has it but never calls it, and it would not work: the average of the counts begins at 0 while that of
the sums begins at the prototypes, so that the first step divides them by too small a count; counts that decay below
its floor draw their prototypes to 0; and the sums are of one rank. Here counts are in shares of the step, 1 for an
expert with its even part, and begin at 1; the move is written as an increment, so that an expert without tokens
stays where it is.

Suffixes: T tokens, D latent, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-6
"""Mass and variance do not fall below it."""


def ema_sums(shares_TE: Tensor, latents_TD: Tensor, squares_TD: Tensor | None, padding_T: Tensor) -> dict[str, Tensor]:
    """What a micro-batch adds to the step: the mass of each expert [E], the sums of the latents and, where given, of
    their squares [E, D], weighted with the tokens' shares (each row of which sums to 1). Padding excluded, detached."""
    # Both factors: what is not finite in a padding position would outlive a product with 0.
    shares_ET = shares_TE.detach().masked_fill(padding_T[:, None], 0.0).t()
    sums = {"lpr_mass": shares_ET.sum(dim=1)}
    for name, x_TD in (("lpr_latents", latents_TD), ("lpr_squares", squares_TD)):
        if x_TD is not None:
            sums[name] = shares_ET @ x_TD.detach().masked_fill(padding_T[:, None], 0.0)
    return sums


@torch.no_grad()
def move_prototypes(
    prototypes_ED: Tensor, mass_E: Tensor, logvar_ED: Tensor | None, sums: dict[str, Tensor], decay: float
) -> None:
    """Moves the state in place by the sums of a step.

    m_e = E * (share of e in the step); c <- decay c + (1 - decay) m; P <- (decay c_old P + (1 - decay) m * mean of e's
    latents) / c. With log variances, likewise for E[x^2] = v + P^2. So the mass of an expert without a token decays, as
    counts do in vector quantisation by a moving average (van den Oord et al. 2017, appendix A.1). A step without any
    token has no shares: it says nothing about balance, and leaves everything as it is.
    """
    step_E = sums["lpr_mass"].to(mass_E.dtype)
    some = step_E.sum() > 0
    scale = step_E.numel() / step_E.sum().clamp(min=_LEAST)
    step_E = step_E * scale
    moved_E = torch.add(mass_E * decay, step_E, alpha=1 - decay).clamp(min=_LEAST)
    rate_E1 = ((1 - decay) / moved_E)[:, None]
    latents_ED = sums["lpr_latents"].to(mass_E.dtype) * scale
    moved_ED = prototypes_ED + rate_E1 * (latents_ED - step_E[:, None] * prototypes_ED)
    if logvar_ED is not None:
        squares_ED = logvar_ED.exp() + prototypes_ED.square()
        squares_ED += rate_E1 * (sums["lpr_squares"].to(mass_E.dtype) * scale - step_E[:, None] * squares_ED)
        logvar_ED.copy_(torch.where(some, (squares_ED - moved_ED.square()).clamp(min=_LEAST).log(), logvar_ED))
    prototypes_ED.copy_(torch.where(some, moved_ED, prototypes_ED))
    mass_E.copy_(torch.where(some, moved_E, mass_E))
