"""Importance and load losses of noisy top-k routing. The coefficient of a LossTerm is not in its sum.

Suffixes: T tokens, E experts, K the chosen k and the next one, G token sets (scopes.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.routing.interface import LossTerm
from moe_train.routing.scopes import TokenSets
from moe_train.routing.topk import mask_of

_NARROWEST = 1e-6
"""Least scale of the noise that P is computed with: softplus underflows, and a quotient by 0 has no gradient."""


def variation_loss(mass_TE: Tensor, sets: TokenSets, name: str, layer: int, coefficient: float) -> LossTerm:
    """CV^2 over experts of the sum of ``mass_TE`` over the tokens of each set (eq. 7 and 11).

    Padding is left out. ``sequence`` and ``micro_batch``: the loss of each set. ``global_batch``: value and gradient
    at the sum over ranks and the window so far; its unit is the token.
    """
    # In float64: near balance CV^2 is what is left of masses that are almost equal.
    mass_GE = sets.sums(mass_TE.double())
    if sets.scope != "global_batch":
        return sets.term(squared_cv(mass_GE).to(mass_TE.dtype), coefficient)
    tokens = sets.tokens_G.sum()
    # One collective: the count travels with the masses. Exact in float64.
    packed = torch.cat([mass_GE.detach().flatten(), tokens.double().view(1)])
    packed = sets.batch.sum_over_window(f"noisy_topk_{name}", layer, packed)
    window_GE, window_tokens = packed[:-1].view_as(mass_GE), packed[-1]
    # Linear in this rank's part, with the slope of the whole. Values add up over ranks weighted with their tokens,
    # gradients must add up to that of the whole times its tokens.
    loss = squared_cv(window_GE + (mass_GE - mass_GE.detach())).sum()
    total = loss.detach() * tokens + (loss - loss.detach()) * window_tokens
    return LossTerm(total.to(mass_TE.dtype), tokens, "token", coefficient)


def squared_cv(mass_GE: Tensor) -> Tensor:
    """Variance over experts (of the population) over the squared mean, [G]; 0 where there is no mass.

    As the mean of (mass / mean mass - 1)^2: no square root, whose gradient at 0 would be NaN, and no difference of
    large numbers.
    """
    mean_G1 = mass_GE.mean(dim=1, keepdim=True)
    some_G1 = mean_G1 > 0
    return (mass_GE / torch.where(some_G1, mean_G1, 1.0) - some_G1.to(mass_GE.dtype)).square().mean(dim=1)


def selection_probability(clean_TE: Tensor, noisy_TE: Tensor, scale_TE: Tensor, best_TK: Tensor) -> Tensor:
    """P(x, e) = Phi((clean_e - t_e) / scale_e), t_e the k-th largest noisy score among the other experts: the
    probability that e is among the k largest when its own noise is drawn anew (eq. 8 and 9), [T, E].

    ``best_TK`` are the k + 1 experts with the largest ``noisy_TE``, in order. Gradients reach the threshold too.
    """
    inside_TE = mask_of(best_TK[:, :-1], noisy_TE.shape[1])
    best_T2 = torch.gather(noisy_TE, 1, best_TK[:, -2:])
    threshold_TE = torch.where(inside_TE, best_T2[:, 1:], best_T2[:, :1])
    return torch.special.ndtr((clean_TE - threshold_TE) / scale_TE.clamp(min=_NARROWEST))
