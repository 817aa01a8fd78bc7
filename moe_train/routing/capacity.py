"""Capacity: an expert takes at most so many tokens of a pool; what comes above is dropped.

Suffixes: T tokens, E experts, K chosen, P pools, M tokens of a pool.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from moe_train.routing.interface import Gate, Routing, TokenBatch
from moe_train.routing.options import CapacityOptions
from moe_train.routing.pools import from_pools, padding_in_pools, rank_in_pool, to_pools, tokens_in_pools


def slots_per_expert(options: CapacityOptions, factor: float, tokens: int, k: int, num_experts: int) -> int:
    """C = max(minimum, ceil(factor * tokens * k / E)), at most ``tokens``; exact for factors of up to six decimals."""
    ratio = _exactly(factor)
    wanted = -(-ratio.numerator * tokens * k // (ratio.denominator * num_experts))
    return min(max(options.minimum, wanted), tokens)


def apply_capacity(
    routing: Routing,
    batch: TokenBatch,
    options: CapacityOptions,
    factor: float,
    max_k: int | None,
    replay_kept_TE: Tensor | None = None,
) -> None:
    """Drops what is above capacity, in place: ``kept_TE``, ``weights_TE`` and ``experts_TK`` lose those slots, the
    other weights stay as they are, ``selected_TE`` stays.

    In each pool an expert keeps at most C of the tokens that selected it, C as in ``slots_per_expert`` with the
    non-padding tokens of the pool and k = ``max_k``, the gate's bound; where there is none, tokens * k is the number of
    slots that the pool's tokens selected. ``position``: the earlier tokens of the pool keep theirs, whatever the
    rank of the expert among a token's choices. ``probability``: those with the larger ``probs_TE``, among equals the
    earlier ones. ``replay_kept_TE``: what was kept in the first pass, for recomputation.
    Time O(T E), by probability O(T E log T). Sources: Lepikhin et al. 2020 (GShard, algorithm 1) and Fedus et al. 2021
    (Switch, eq. 3) for position, where GShard serves all first choices before second ones; by probability as "batch
    prioritized routing" of Riquelme et al. 2021 (arXiv 2106.05974), per expert, as megatron-core does.
    """
    kept_TE = replay_kept_TE
    if kept_TE is None:
        kept_TE = _kept(routing, batch, options, factor, max_k)
    routing.kept_TE = kept_TE
    routing.weights_TE = routing.weights_TE * kept_TE
    if routing.experts_TK is not None:
        num_experts = kept_TE.shape[1]
        kept_TK = torch.gather(kept_TE, 1, routing.experts_TK.clamp(max=num_experts - 1))
        routing.experts_TK = torch.where(kept_TK, routing.experts_TK, num_experts)


def _kept(routing: Routing, batch: TokenBatch, options: CapacityOptions, factor: float, max_k: int | None) -> Tensor:
    selected_PME = to_pools(routing.kept_TE, batch, options.pool)
    capacity_P = _capacity(selected_PME, tokens_in_pools(batch, options.pool), options, factor, max_k)
    if options.drop == "position":
        place_PME = selected_PME.cumsum(dim=1) - 1
    else:
        scores_PME = to_pools(routing.probs_TE.detach(), batch, options.pool)
        # Below every probability: who did not select the expert comes behind all who did.
        scores_PME = scores_PME.masked_fill(~selected_PME, -torch.inf)
        place_PME = rank_in_pool(scores_PME, padding_in_pools(batch, options.pool))
    return from_pools(selected_PME & (place_PME < capacity_P[:, None, None]), batch, options.pool)


def _capacity(
    selected_PME: Tensor, tokens_P: Tensor, options: CapacityOptions, factor: float, max_k: int | None
) -> Tensor:
    """int64 [P], as ``slots_per_expert``; not read on the host."""
    slots_P = selected_PME.sum(dim=(1, 2)) if max_k is None else tokens_P * max_k
    ratio = _exactly(factor)
    divisor = ratio.denominator * selected_PME.shape[2]
    wanted_P = (ratio.numerator * slots_P + divisor - 1).div(divisor, rounding_mode="floor")
    return torch.minimum(wanted_P.clamp(min=options.minimum), tokens_P)


def _exactly(factor: float) -> Fraction:
    """In integers, so that 1.1 * 100 / 10 is 11 and not a little more, whose ceiling would be 12."""
    return Fraction(str(factor)).limit_denominator(10**6)


def rows_per_expert(options: CapacityOptions, max_k: int | None, batch: TokenBatch, num_experts: int) -> int | None:
    """Rows that every expert computes for a micro-batch with ``pad``: its capacity in the fullest pools of that shape,
    over all pools. None where nothing is dropped or padded. Known without the device."""
    if not options.pad or options.factor is None:
        return None
    assert max_k is not None
    pools, tokens = batch.batch_size, batch.sequence_length
    if options.pool == "micro_batch":
        pools, tokens = 1, pools * tokens
    return pools * slots_per_expert(options, options.factor, tokens, max_k, num_experts)


def looks_ahead(options: CapacityOptions, gate: Gate) -> bool:
    """Whether what a token keeps can depend on later tokens of its pool, in training or evaluation.

    By probability it does. By position it does where the gate has no bound on k, because then the number of slots
    depends on what all tokens of the pool selected.
    """
    if options.factor is None and options.evaluation_factor is None:
        return False
    return options.drop == "probability" or gate.max_k is None


def bound_advice(gate: Gate) -> str:
    """Beginning of what to do about a missing bound on experts per token; empty where the gate has no option for it."""
    return "set router.options.max_k, or " if hasattr(getattr(gate, "options", None), "max_k") else ""


def check_capacity(options: CapacityOptions, gate: Gate, name: str) -> None:
    """ValueError on values that make no sense, or not with this gate; ``name`` is the gate's."""
    for key in ("factor", "evaluation_factor"):
        factor = getattr(options, key)
        if factor is not None and not 1e-3 <= factor <= 1e6:
            raise ValueError(f"router.capacity.{key} is {factor}; give a number from 0.001 to 1e6, or null for none")
    if options.minimum < 1:
        raise ValueError(f"router.capacity.minimum is {options.minimum}; it must be at least 1")
    if options.pad and options.factor is None:
        raise ValueError("router.capacity.pad does nothing without a capacity: set router.capacity.factor")
    if options.factor is None and options.evaluation_factor is None:
        return
    if not gate.takes_capacity:
        raise ValueError(
            f"router.capacity makes no sense for gate {name!r}, whose experts take a set number of tokens anyway: set"
            " factor and evaluation_factor to null"
        )
    if options.pad and gate.max_k is None:
        raise ValueError(
            f"router.capacity.pad needs shapes that are known beforehand, but gate {name!r} has no bound on experts per"
            f" token: {bound_advice(gate)}switch pad off"
        )
    if options.evaluation_factor is not None and options.pool == "micro_batch":
        raise ValueError(
            "router.capacity.evaluation_factor with pool micro_batch would make an evaluation depend on its batch size:"
            " take pool sequence, or set evaluation_factor to null"
        )
