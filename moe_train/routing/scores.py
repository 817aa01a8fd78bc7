"""What the scores of a gate say, as sums over tokens: size of the logits, entropy and margin of the choice.

Sums are float64 and counts int64, so that they add up exactly enough over micro-batches and ranks.

Suffixes: T tokens, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def z_sum(logits_TE: Tensor, padding_T: Tensor) -> Tensor:
    """Sum over tokens of logsumexp(logits)^2, the z-loss of ST-MoE (Zoph et al. 2022, eq. 5) before its mean, measured
    whether or not it is a loss. float64 scalar; padding counts nothing."""
    return torch.logsumexp(logits_TE, dim=-1).double().square().masked_fill(padding_T, 0.0).sum()


@torch.no_grad()
def entropy_sum(probs_TE: Tensor, counted_T: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the counted tokens of -sum_e p_e ln p_e / ln E, and the number of these tokens: 0 a gate that is sure of
    one expert, 1 one that has no preference. p is divided by its sum; a token whose p sums to nothing is not counted.
    """
    probs_TE = probs_TE.double()
    total_T = probs_TE.sum(-1)
    counted_T = counted_T & (total_T > 0)
    probs_TE = probs_TE / total_T.masked_fill(~counted_T, 1.0)[:, None]
    entropy_T = -torch.xlogy(probs_TE, probs_TE).sum(-1) / math.log(max(2, probs_TE.shape[1]))
    return entropy_T.masked_fill(~counted_T, 0.0).sum(), counted_T.sum()


@torch.no_grad()
def margin_sum(scores_TE: Tensor, selected_TE: Tensor, counted_T: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the counted tokens of (lowest score among the chosen experts) - (highest among the others), and the
    number of these tokens. A token that chose none or all has no margin and is not counted. Negative where something
    besides the score decided (a bias, groups, experts that choose tokens)."""
    number_T = selected_TE.sum(-1)
    counted_T = counted_T & (number_T > 0) & (number_T < selected_TE.shape[1])
    scores_TE = scores_TE.double()
    chosen_T = scores_TE.masked_fill(~selected_TE, math.inf).amin(-1)
    other_T = scores_TE.masked_fill(selected_TE, -math.inf).amax(-1)
    # An expert that was masked away by -inf is no runner-up.
    counted_T = counted_T & torch.isfinite(chosen_T) & torch.isfinite(other_T)
    return (chosen_T - other_T).masked_fill(~counted_T, 0.0).sum(), counted_T.sum()
