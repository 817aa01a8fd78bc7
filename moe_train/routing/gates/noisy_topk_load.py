"""The smooth load of noisy top-k routing.

Suffixes: T tokens, E experts, K the chosen k and the next one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.routing.topk import mask_of

_NARROWEST = 1e-6
"""Least scale of the noise that P is computed with: softplus underflows, and a quotient by 0 has no gradient."""


def selection_probability(clean_TE: Tensor, noisy_TE: Tensor, scale_TE: Tensor, best_TK: Tensor) -> Tensor:
    """P(x, e) = Phi((clean_e - t_e) / scale_e), t_e the k-th largest noisy score among the other experts: the
    probability that e is among the k largest when its own noise is drawn anew (eq. 8 and 9), [T, E].

    ``best_TK`` are the k + 1 experts with the largest ``noisy_TE``, in order. Gradients reach the threshold too.
    """
    inside_TE = mask_of(best_TK[:, :-1], noisy_TE.shape[1])
    best_T2 = torch.gather(noisy_TE, 1, best_TK[:, -2:])
    threshold_TE = torch.where(inside_TE, best_T2[:, 1:], best_T2[:, :1])
    return torch.special.ndtr((clean_TE - threshold_TE) / scale_TE.clamp(min=_NARROWEST))
