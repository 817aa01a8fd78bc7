"""Balancing that goes with any gate: switch loss, z-loss, importance loss and the selection bias without a loss.

Suffixes: T tokens, E experts, S sequence, B sequences, G token sets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.routing.interface import LossTerm, TokenBatch
from moe_train.routing.options import BiasOptions, SwitchLossOptions
from moe_train.routing.schedule import Ramp, value_at
from moe_train.routing.scopes import TokenSets


def switch_loss(
    probs_TE: Tensor, load_BE: Tensor, batch: TokenBatch, layer: int, options: SwitchLossOptions
) -> LossTerm:
    """E * sum_e f_e P_e with f_e the expert's share of all selected slots and P_e its mean probability.

    Exactly 1 at perfect balance for every k. Gradient through P only, finite everywhere. f and P are taken over one
    sequence, one micro-batch, or the global batch: there f is summed over ranks and over the window so far, and
    the unit is the token, so that E * sum_e f_e * (sum of p over the step's tokens) / (tokens of the step) comes out.
    Source: Fedus et al. 2021, eq. 4 to 6, with f divided by k; global batch: Qiu et al. 2025 (arXiv 2501.11873).
    """
    experts = probs_TE.shape[1]
    sets = TokenSets(batch, options.scope)
    probs_GE = sets.sums(probs_TE)
    load_GE = load_BE if options.scope == "sequence" else load_BE.sum(0, keepdim=True)
    if options.scope == "global_batch":
        load_GE = batch.sum_over_window("switch_load", layer, load_GE)
    share_GE = load_GE.to(probs_GE.dtype) / load_GE.sum(1, keepdim=True).clamp(min=1)
    total_G = experts * (share_GE * probs_GE).sum(1)
    return sets.term_of_means(total_G, value_at(options.coefficient, batch.step))


def importance_loss(
    importance_TE: Tensor, sets: TokenSets, layer: int, coefficient: float, name: str = "importance"
) -> LossTerm:
    """CV^2 of the experts' importance, the column sums of ``importance_TE`` [T, E] over each token set: variance
    (divided by E) over squared mean, 0 at perfect balance and E - 1 where one expert has everything.

    Any amount per token and expert, such as probabilities, combine weights or a smooth load; ``name`` tells several
    apart. No root is taken, so that the gradient is finite at perfect balance, where it is 0. A set whose sum is 0 has
    loss 0. Source: Shazeer et al. 2017 (arXiv 1701.06538), eq. 6 and 7 (there over a batch).
    """
    # In float64: near balance CV^2 is what is left of amounts that are almost equal.
    own_GE = sets.sums(importance_TE.double())
    if sets.scope != "global_batch":
        return sets.term(squared_cv(own_GE).to(importance_TE.dtype), coefficient)
    tokens = sets.tokens_G.sum()
    # One collective: the number of tokens travels with the sums. Exact in float64.
    packed = torch.cat([own_GE.detach().flatten(), tokens.double().view(1)])
    packed = sets.batch.sum_over_window(name, layer, packed)
    window_GE, window_tokens = packed[:-1].view_as(own_GE), packed[-1]
    # The value is that of the window, weighted with this rank's tokens; the gradient its own part of the window's, and
    # the unit is the token, hence the other factor.
    loss = squared_cv(window_GE + (own_GE - own_GE.detach())).sum()
    value = loss.detach() * tokens + (loss - loss.detach()) * window_tokens
    return LossTerm(value.to(importance_TE.dtype), tokens, "token", coefficient)


def squared_cv(total_GE: Tensor) -> Tensor:
    """Variance over experts (of the population) over the squared mean, [G]; 0 where there is next to nothing.

    As the mean of (x / mean x - 1)^2: no square root, whose gradient at 0 would be NaN, and no difference of large
    numbers.
    """
    mean_G1 = total_GE.mean(dim=1, keepdim=True)
    # So that what is divided by it stays finite, also as a float32 gradient.
    some_G1 = mean_G1 > torch.finfo(torch.float32).tiny ** 0.5
    ratio_GE = torch.where(some_G1, total_GE, 1.0) / torch.where(some_G1, mean_G1, 1.0)
    return (ratio_GE - 1).square().mean(dim=1)


def z_loss(logits_TE: Tensor, batch: TokenBatch, coefficient: float | Ramp) -> LossTerm:
    """logsumexp(logits)^2, mean over tokens. Source: Zoph et al. 2022 (ST-MoE), eq. 5."""
    z_T = torch.logsumexp(logits_TE, dim=-1).square().masked_fill(batch.padding_T, 0.0)
    return LossTerm(z_T.sum(), (~batch.padding_T).sum(), "token", value_at(coefficient, batch.step))


@torch.no_grad()
def move_bias(bias_E: Tensor, load_E: Tensor, options: BiasOptions) -> None:
    """Moves the bias in place towards the target load and centres it; ``load_E`` are the exact counts of the step.

    sign: rate * sign(wanted - load) (Wang et al. 2024, algorithm 1); proportional: rate * (wanted - load) / mean load,
    one divisor for all experts, so that the moves sum to zero. wanted is the mean load or, with ``target_load``, the
    expert's share of the total. Equal shares are compared in integers; others in float64, exactly so for targets in
    whole numbers up to products of 2^53. A step without tokens moves nothing.
    """
    total = load_E.sum()
    if options.target_load is None:
        lack_E, unit = total - load_E * load_E.numel(), total
    else:
        target_E = torch.tensor(options.target_load, dtype=torch.float64, device=load_E.device)
        lack_E, unit = total * target_E - load_E * target_E.sum(), total * target_E.mean()
    if options.rule == "sign":
        direction_E = torch.sign(lack_E)
    else:
        direction_E = torch.where(total > 0, lack_E.double() / unit, 0.0)
    bias_E.add_(direction_E.to(bias_E.dtype), alpha=options.rate)
    bias_E.sub_(bias_E.mean())
