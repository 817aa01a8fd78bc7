"""Rows past those that experts own may hold anything: combine and the gradient of permute never read them."""

from __future__ import annotations

import torch

from moe_train.model import dispatch
from moe_train.routing.interface import Routing

TOKENS, EXPERTS, SLOTS, HIDDEN = 9, 4, 2, 3


def _permutation(unused: list[tuple[int, int]]) -> dispatch.Permutation:
    experts_TK = torch.stack([torch.randperm(EXPERTS)[:SLOTS] for _ in range(TOKENS)])
    for slot in unused:
        experts_TK[slot] = EXPERTS
    kept_TE = torch.zeros(TOKENS, EXPERTS + 1, dtype=torch.bool).scatter(1, experts_TK, True)[:, :EXPERTS]
    nothing = torch.zeros(TOKENS, EXPERTS)
    return dispatch.make_permutation(Routing(nothing, nothing, nothing, kept_TE, kept_TE, experts_TK=experts_TK))


def _poisoned(permutation: dispatch.Permutation) -> torch.Tensor:
    rows = torch.randn(TOKENS * SLOTS, HIDDEN, dtype=torch.float64)
    rows[int(permutation.counts_E.sum()) :] = float("nan")
    return rows


def _expected(rows: torch.Tensor, permutation: dispatch.Permutation) -> torch.Tensor:
    out = torch.zeros(TOKENS, HIDDEN, dtype=rows.dtype)
    for token in range(TOKENS):
        for slot in range(SLOTS):
            if permutation.used_TK[token, slot]:
                out[token] += rows[permutation.row_TK[token, slot]]
    return out


def test_all_slots_used_and_some_unused() -> None:
    torch.manual_seed(0)
    for unused in ([], [(2, 1)], [(0, 0), (0, 1), (8, 1)], [(t, k) for t in range(TOKENS) for k in range(SLOTS)]):
        permutation = _permutation(unused)
        rows = _poisoned(permutation)
        torch.testing.assert_close(dispatch.combine(rows, permutation), _expected(rows, permutation))


def test_gradient_of_permute() -> None:
    torch.manual_seed(0)
    permutation = _permutation([(3, 0), (3, 1), (5, 1)])
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    rows, weights = dispatch.permute(x, torch.rand(TOKENS, EXPERTS, dtype=torch.float64), permutation)
    gradient = _poisoned(permutation)
    (dx,) = torch.autograd.grad(rows, x, gradient)
    torch.testing.assert_close(dx, _expected(gradient, permutation))
