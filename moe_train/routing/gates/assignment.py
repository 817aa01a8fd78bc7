"""The even assignment of tokens to experts with the largest total score, exactly.

Suffixes: P pools, M tokens of a pool, E experts, N = E + 1 nodes: the experts and the store of places to spare; A pools
with tokens to move, R tokens of some experts of some pools.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INDEX_BITS = 22
_SCORE_BITS = 38
_NEVER = 2**60


def balanced_assignment(scores_PME: Tensor, padding_PM: Tensor) -> Tensor:
    """Expert of each token, int64 [P, M] on the host (E for padding): of all assignments in which each expert gets
    floor(n / E) or ceil(n / E) of the n tokens of a pool, one with the largest sum of scores. Which experts get one
    more is part of the choice.

    Exact for scores rounded to 2^-37 of the power of two above the pool's largest absolute score, in integers, so the
    same on every device. Ties are broken in a fixed way. Method: a flow of least cost by shortest augmenting paths.
    Every token begins at its best expert, which costs nothing; then, one at a time, the tokens that an expert has above
    floor(n / E) go along the cheapest chain of exchanges to an expert with a free place. The n mod E places to spare
    are a further node, which gives each expert at most one. All pools take their steps at the same time. Time for a
    pool O(M E) and, for each token to move, O(L E^2 + M + E R), L the length of the longest chain, R the tokens of the
    experts that it touches. At most 2^22 tokens per pool.
    Source: Ahuja, Magnanti and Orlin 1993, "Network flows", section 9.7 (successive shortest paths).
    """
    # The step of scores that are not finite is refused later; until then they must not keep the search from ending.
    finite_PME = scores_PME.detach().double().cpu().nan_to_num(0.0, 0.0, 0.0)
    return _Assignment(finite_PME, padding_PM.cpu()).find()


class _Assignment:
    """The tokens of all pools on their way to an even assignment.

    ``cost_PME``: how far a score is below the best of its token. ``exchange_PEE``: the cheapest move of a token from
    one expert to another, its cost in the high bits and the token in the low ones. ``spared_PE``: who has a place to
    spare.
    """

    def __init__(self, scores_PME: Tensor, padding_PM: Tensor) -> None:
        pools, _, self.experts = scores_PME.shape
        # A power of two scales without rounding.
        scores_PME = scores_PME.masked_fill(padding_PM[..., None], 0.0)
        _, exponent_P = torch.frexp(scores_PME.abs().amax(dim=(1, 2)))
        whole_PME = torch.ldexp(scores_PME, _SCORE_BITS - 1 - exponent_P[:, None, None]).round().long()
        self.cost_PME = whole_PME.amax(dim=2, keepdim=True) - whole_PME
        self.expert_PM = self.cost_PME.argmin(dim=2).masked_fill(padding_PM, self.experts)
        self.spared_PE = torch.zeros(pools, self.experts, dtype=torch.bool)
        load_PE = torch.zeros(pools, self.experts + 1, dtype=torch.long)
        load_PE = load_PE.scatter_add(1, self.expert_PM, torch.ones_like(self.expert_PM))[:, :-1]
        tokens_P1 = load_PE.sum(dim=1, keepdim=True)
        share_P1, spare_P1 = tokens_P1 // self.experts, tokens_P1 % self.experts
        self.excess_PN = torch.cat([(load_PE - share_P1).clamp(min=0), torch.zeros_like(spare_P1)], dim=1)
        self.places_PN = torch.cat([(share_P1 - load_PE).clamp(min=0), spare_P1], dim=1)
        self.exchange_PEE = torch.full((pools, self.experts, self.experts), _NEVER << 1)
        self._update_exchanges(torch.ones_like(self.spared_PE))

    def find(self) -> Tensor:
        """Expert of each token, int64 [P, M]; E for padding."""
        while len(pool_A := self.excess_PN.any(dim=1).nonzero().flatten()):
            distance_AN, before_AN = self._shortest_paths(pool_A)
            last_A = distance_AN.masked_fill(self.places_PN[pool_A] == 0, _NEVER).argmin(dim=1)
            touched_PE = torch.zeros_like(self.spared_PE)
            paths = zip(pool_A.tolist(), last_A.tolist(), before_AN.tolist(), strict=True)
            first_A = torch.tensor([self._move(pool, last, before, touched_PE) for pool, last, before in paths])
            self.excess_PN[pool_A, first_A] -= 1
            self.places_PN[pool_A, last_A] -= 1
            self._update_exchanges(touched_PE)
        return self.expert_PM

    def _update_exchanges(self, touched_PE: Tensor) -> None:
        """The rows of ``exchange_PEE`` that belong to experts whose tokens have changed."""
        self.exchange_PEE[touched_PE] = _NEVER << 1
        nobody_P1 = torch.zeros(len(touched_PE), 1, dtype=torch.bool)
        pool_R, token_R = torch.cat([touched_PE, nobody_P1], dim=1).gather(1, self.expert_PM).nonzero(as_tuple=True)
        expert_R = self.expert_PM[pool_R, token_R]
        cost_RE = self.cost_PME[pool_R, token_R]
        cost_RE = cost_RE - cost_RE.gather(1, expert_R[:, None])
        move_RE = (cost_RE << _INDEX_BITS) | token_R[:, None]
        row_RE = (pool_R * self.experts + expert_R)[:, None].expand(-1, self.experts)
        self.exchange_PEE.view(-1, self.experts).scatter_reduce_(0, row_RE, move_RE, reduce="amin")

    def _shortest_paths(self, pool_A: Tensor) -> tuple[Tensor, Tensor]:
        """Distance of each node from the nearest one with tokens to move, and the node before it (-1 at the start of a
        path), by Bellman and Ford. Lengths may be negative, those of cycles are not."""
        exchange_AEE, spared_AE = self.exchange_PEE[pool_A], self.spared_PE[pool_A]
        weight_ANN = torch.full((len(pool_A), self.experts + 1, self.experts + 1), _NEVER)
        weight_ANN[:, :-1, :-1] = (exchange_AEE >> _INDEX_BITS).masked_fill(exchange_AEE == _NEVER << 1, _NEVER)
        weight_ANN[:, :-1, -1] = torch.where(spared_AE, _NEVER, 0)
        weight_ANN[:, -1, :-1] = torch.where(spared_AE, 0, _NEVER)
        distance_AN = torch.where(self.excess_PN[pool_A] > 0, 0, _NEVER)
        before_AN = torch.full_like(distance_AN, -1)
        while True:  # Ends: there are no cycles of negative length.
            best_AN, through_AN = (distance_AN[:, :, None] + weight_ANN).min(dim=1)
            # What leads through a node that cannot be reached, or along no edge, is at least _NEVER minus a path.
            shorter_AN = (best_AN < distance_AN) & (best_AN < _NEVER >> 1)
            if not bool(shorter_AN.any()):
                return distance_AN, before_AN
            distance_AN = torch.where(shorter_AN, best_AN, distance_AN)
            before_AN = torch.where(shorter_AN, through_AN, before_AN)

    def _move(self, pool: int, last: int, before_N: list[int], touched_PE: Tensor) -> int:
        """Carries out the exchanges of the path of a pool that ends in ``last``; returns where it began. Marks the
        experts whose tokens or places it has changed."""
        node = last
        while (before := before_N[node]) >= 0:
            if node == self.experts:
                self.spared_PE[pool, before] = True
            elif before == self.experts:
                self.spared_PE[pool, node] = False
            else:
                token = int(self.exchange_PEE[pool, before, node]) & ((1 << _INDEX_BITS) - 1)
                self.expert_PM[pool, token] = node
            for expert in (before, node):
                if expert < self.experts:
                    touched_PE[pool, expert] = True
            node = before
        return node
