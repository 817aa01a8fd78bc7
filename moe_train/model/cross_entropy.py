"""Linear projection and cross-entropy in one, a chunk of tokens at a time, beside a plain reference.

Suffixes: T tokens, C tokens of one chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_reference(
    hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, target_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-likelihoods (nats) over the target tokens, and each token's own (0 elsewhere)."""
    logits_TV = (hidden_TH @ weight_VH.t()).float() if hidden_TH.dtype != torch.float64 else hidden_TH @ weight_VH.t()
    nll_T = F.cross_entropy(logits_TV, labels_T, reduction="none").masked_fill(~target_T, 0.0)
    return nll_T.sum(), nll_T.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits exist, so that they are computed once and
    never for all tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        labels_T: Tensor,
        target_T: Tensor,
        chunk: int,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        accumulate = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
        nll_T = torch.empty(hidden_TH.shape[0], dtype=accumulate, device=hidden_TH.device)
        dhidden_TH = torch.empty_like(hidden_TH) if needs_grad else None
        dweight_VH = torch.zeros_like(weight_VH, dtype=accumulate) if needs_grad else None
        for start in range(0, hidden_TH.shape[0], chunk):
            part = slice(start, start + chunk)
            hidden_CH, labels_C1, target_C = hidden_TH[part], labels_T[part, None], target_T[part]
            logits_CV = torch.mm(hidden_CH, weight_VH.t()).to(accumulate)
            label_C1 = logits_CV.gather(1, labels_C1)
            largest_C1 = logits_CV.amax(dim=1, keepdim=True)
            exp_CV = logits_CV.sub_(largest_C1).exp_()
            total_C1 = exp_CV.sum(dim=1, keepdim=True)
            nll_C1 = total_C1.log() + (largest_C1 - label_C1)
            nll_T[part] = nll_C1[:, 0].masked_fill(~target_C, 0.0)
            if dhidden_TH is None or dweight_VH is None:
                continue
            # d nll / d logits = (exp - total * onehot) / total, zero rows where the token is no target. The row's
            # factor goes into the small matrices where nothing is rounded to a shorter type in between.
            dlogits_CV = exp_CV.scatter_add_(1, labels_C1, -total_C1)
            factor_C1 = target_C[:, None] / total_C1
            if accumulate == hidden_TH.dtype:
                torch.mm(dlogits_CV, weight_VH, out=dhidden_TH[part])
                dhidden_TH[part] *= factor_C1
                dweight_VH.addmm_(dlogits_CV.t(), hidden_CH * factor_C1)
            else:
                short_CV = dlogits_CV.mul_(factor_C1).to(hidden_TH.dtype)
                torch.mm(short_CV, weight_VH, out=dhidden_TH[part])
                dweight_VH += short_CV.t() @ hidden_CH
        if needs_grad:
            ctx.save_for_backward(dhidden_TH, dweight_VH)
            ctx.dtype = weight_VH.dtype
        ctx.mark_non_differentiable(nll_T)
        return nll_T.sum(), nll_T

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Any) -> tuple[Tensor, Tensor, None, None, None, None]:
        # In place: they are as large as the weight. A second backward pass is refused by autograd's version check.
        dhidden_TH, dweight_VH = ctx.saved_tensors
        dhidden_TH.mul_(dloss.to(dhidden_TH.dtype))
        return dhidden_TH, dweight_VH.mul_(dloss).to(ctx.dtype), None, None, None, None


def linear_cross_entropy(
    hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, target_T: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """The reference's function; logits exist for at most ``chunk`` tokens."""
    needs_grad = torch.is_grad_enabled() and (hidden_TH.requires_grad or weight_VH.requires_grad)
    return _LinearCrossEntropy.apply(hidden_TH, weight_VH, labels_T, target_T, chunk, needs_grad)
