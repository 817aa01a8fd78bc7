"""Which token comes next.

Order of operations, all in float32: logits / temperature, then the top_k largest, then among what is left (its
probabilities made to sum to one again) the smallest set of top_p; of these one is drawn. Ties go to the lower id.

Suffixes: B sequences, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.evaluation.generation.options import GenerationOptions


def choose(logits_BV: Tensor, uniform_B: Tensor, options: GenerationOptions) -> Tensor:
    """The next id of each sequence, int64 [B]. ``uniform_B``: float64 random numbers in [0, 1); unused when greedy."""
    if options.temperature == 0:
        return greedy(logits_BV.float())
    return draw(candidates(logits_BV, options), uniform_B)


def greedy(logits_BV: Tensor) -> Tensor:
    """The id with the largest logit; torch's argmax promises nothing about ties."""
    largest_B1 = logits_BV.max(dim=-1, keepdim=True).values
    id_V = torch.arange(logits_BV.shape[-1], device=logits_BV.device)
    return torch.where(logits_BV == largest_B1, id_V, logits_BV.shape[-1] - 1).min(dim=-1).values


def candidates(logits_BV: Tensor, options: GenerationOptions) -> Tensor:
    """Probabilities that tokens are drawn with, float32 [B, V]; zero for those that are left out."""
    logits_BV = logits_BV.float()
    if options.top_k is not None:  # The temperature does not change which ones these are.
        logits_BV = logits_BV.masked_fill(~_largest(logits_BV, options.top_k), -torch.inf)
    # The largest becomes 0, which no temperature makes infinite unless 1 / temperature is; the others may go to -inf.
    below_BV = logits_BV - logits_BV.max(dim=-1, keepdim=True).values
    probs_BV = torch.softmax(below_BV / max(options.temperature, torch.finfo(torch.float32).tiny), dim=-1)
    if options.top_p is None or options.top_p == 1:
        return probs_BV
    probs_BV = probs_BV.masked_fill(~_nucleus(probs_BV, options.top_p), 0.0)
    return probs_BV / probs_BV.sum(-1, keepdim=True)


def draw(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first id at which the sum of the probabilities up to it exceeds the random number.

    By rising id, not by falling probability: two nearly equal probabilities that change places change nothing, so that
    rounding moves a draw only where the random number lies within that rounding of a bound.
    """
    upto_BV = probs_BV.double().cumsum(-1)
    threshold_B1 = uniform_B[:, None] * upto_BV[:, -1:]
    return (upto_BV <= threshold_B1).sum(-1)


def _largest(scores_BV: Tensor, k: int) -> Tensor:
    """bool [B, V]: the k largest; among equals the lower ids. Minus infinity is not among them."""
    k = min(k, scores_BV.shape[-1])
    smallest_B1 = torch.topk(scores_BV, k, dim=-1).values[:, -1:]
    above_BV, equal_BV = scores_BV > smallest_B1, scores_BV == smallest_B1
    room_B1 = k - above_BV.sum(-1, keepdim=True)
    return above_BV | (equal_BV & (equal_BV.cumsum(-1) <= room_B1))


def _nucleus(probs_BV: Tensor, share: float) -> Tensor:
    """bool [B, V]: tokens by falling probability, among equals by rising id, as long as those before one have less than
    ``share``; never none."""
    sorted_BV, id_BV = torch.sort(probs_BV, dim=-1, descending=True, stable=True)
    before_BV = sorted_BV.double().cumsum(-1) - sorted_BV.double()
    chosen_BV = before_BV < share
    chosen_BV[:, 0] = True
    return torch.zeros_like(chosen_BV).scatter(-1, id_BV, chosen_BV)
