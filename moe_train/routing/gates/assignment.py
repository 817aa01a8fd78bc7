"""The even assignment of tokens to experts with the largest total score, exactly.

Suffixes: P pools, M tokens of a pool, E experts, N = E + 1 nodes: the experts and the store of places to spare.
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
    are a further node, which gives each expert at most one. Time O(M E) and, for each token to move, O(L (E^2 + M)),
    L the length of the longest chain. At most 2^22 tokens per pool.
    Source: Ahuja, Magnanti and Orlin 1993, "Network flows", section 9.7 (successive shortest paths).
    """
    experts = scores_PME.shape[2]
    expert_PM = torch.full(scores_PME.shape[:2], experts)
    real_PM = ~padding_PM.cpu()
    # The step of scores that are not finite is refused later; until then they must not keep the search from ending.
    finite_PME = scores_PME.detach().double().cpu().nan_to_num(0.0, 0.0, 0.0)
    for pool, scores_ME in enumerate(finite_PME):
        if bool(real_PM[pool].any()):
            expert_PM[pool, real_PM[pool]] = _Pool(scores_ME[real_PM[pool]]).assign()
    return expert_PM


class _Pool:
    """The tokens of one pool on their way to an even assignment.

    ``cost_ME``: how far a score is below the best of its token. ``exchange_EE``: the cheapest move of a token from one
    expert to another, its cost in the high bits and the token in the low ones. ``spared_E``: who has a place to spare.
    """

    def __init__(self, scores_ME: Tensor) -> None:
        # A power of two scales without rounding.
        _, exponent = torch.frexp(scores_ME.abs().amax())
        whole_ME = torch.ldexp(scores_ME, _SCORE_BITS - 1 - exponent).round().long()
        self.cost_ME = whole_ME.amax(dim=1, keepdim=True) - whole_ME
        tokens, self.experts = self.cost_ME.shape
        self.expert_M = self.cost_ME.argmin(dim=1)
        self.spared_E = torch.zeros(self.experts, dtype=torch.bool)
        load_E = torch.bincount(self.expert_M, minlength=self.experts)
        share, spare = divmod(tokens, self.experts)
        self.excess_N = torch.tensor([*(load_E - share).clamp(min=0).tolist(), 0])
        self.places_N = torch.tensor([*(share - load_E).clamp(min=0).tolist(), spare])
        self.exchange_EE = torch.stack([self._exchanges(expert) for expert in range(self.experts)])

    def assign(self) -> Tensor:
        """Expert of each token, int64 [M]."""
        for _ in range(int(self.excess_N.sum())):
            distance_N, before_N = self._shortest_paths()
            last = int(distance_N.masked_fill(self.places_N == 0, _NEVER).argmin())
            first = self._move(last, before_N.tolist())
            self.excess_N[first] -= 1
            self.places_N[last] -= 1
        return self.expert_M

    def _exchanges(self, expert: int) -> Tensor:
        """The row of ``exchange_EE`` that belongs to an expert."""
        tokens_R = (self.expert_M == expert).nonzero().flatten()
        if not len(tokens_R):
            return torch.full((self.experts,), _NEVER << 1)
        cost_RE = self.cost_ME[tokens_R]
        return (((cost_RE - cost_RE[:, expert, None]) << _INDEX_BITS) | tokens_R[:, None]).amin(dim=0)

    def _shortest_paths(self) -> tuple[Tensor, Tensor]:
        """Distance of each node from the nearest one with tokens to move, and the node before it (-1 at the start of a
        path), by Bellman and Ford. Lengths may be negative, those of cycles are not."""
        weight_NN = torch.full((self.experts + 1, self.experts + 1), _NEVER)
        weight_NN[:-1, :-1] = torch.where(self.exchange_EE < _NEVER << 1, self.exchange_EE >> _INDEX_BITS, _NEVER)
        weight_NN[:-1, -1] = torch.where(self.spared_E, _NEVER, 0)
        weight_NN[-1, :-1] = torch.where(self.spared_E, 0, _NEVER)
        distance_N = torch.where(self.excess_N > 0, 0, _NEVER)
        before_N = torch.full_like(distance_N, -1)
        while True:  # Ends: there are no cycles of negative length.
            best_N, through_N = (distance_N[:, None] + weight_NN).min(dim=0)
            # What leads through a node that cannot be reached, or along no edge, is at least _NEVER minus a path.
            shorter_N = (best_N < distance_N) & (best_N < _NEVER >> 1)
            if not bool(shorter_N.any()):
                return distance_N, before_N
            distance_N = torch.where(shorter_N, best_N, distance_N)
            before_N = torch.where(shorter_N, through_N, before_N)

    def _move(self, last: int, before_N: list[int]) -> int:
        """Carries out the exchanges of the path that ends in ``last``; returns where it began."""
        node, touched = last, {last}
        while (before := before_N[node]) >= 0:
            if node == self.experts:
                self.spared_E[before] = True
            elif before == self.experts:
                self.spared_E[node] = False
            else:
                token = int(self.exchange_EE[before, node]) & ((1 << _INDEX_BITS) - 1)
                self.expert_M[token] = node
            touched.add(before)
            node = before
        for expert in touched - {self.experts}:
            self.exchange_EE[expert] = self._exchanges(expert)
        return node
