"""Permute and combine on one rank against a loop over tokens, in float64.

Suffixes: T tokens, H hidden, E experts, K slots.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_train.model import dispatch
from moe_train.model.experts.reference import experts_reference
from moe_train.routing.interface import Routing

TOKENS, HIDDEN, EXPERTS, WIDTH = 19, 6, 5, 4


def selection(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    random_TE = torch.rand(TOKENS, EXPERTS, generator=generator) < 0.4
    if kind == "random":
        random_TE[3] = random_TE[TOKENS - 1] = False
        return random_TE
    if kind == "experts without tokens":
        random_TE[:, [0, 3]] = False
        return random_TE
    if kind == "all on one":
        return torch.zeros_like(random_TE).index_fill(1, torch.tensor([2]), True)
    return {"none": torch.zeros_like(random_TE), "all": torch.ones_like(random_TE)}[kind]


KINDS = ("random", "experts without tokens", "all on one", "none", "all")


def routing(kind: str, weights_TE: Tensor, slots: int | None) -> Routing:
    """With ``slots`` the gate says itself which experts, in an order of its own, unused slots anywhere."""
    kept_TE = selection(kind)
    experts_TK = None
    if slots is not None:
        experts_TK = torch.full((TOKENS, slots), EXPERTS)
        for token in range(TOKENS):
            chosen = kept_TE[token].nonzero()[:, 0].flip(0)
            where = torch.randperm(slots, generator=torch.Generator().manual_seed(token))[: len(chosen)]
            experts_TK[token, where] = chosen
    weights_TE = weights_TE * kept_TE
    return Routing(weights_TE, weights_TE, weights_TE, kept_TE, kept_TE, experts_TK=experts_TK)


def leaves() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(TOKENS, HIDDEN), (TOKENS, EXPERTS), (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)


def fast(
    kind: str, slots: int | None, x: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, padded: int | None = None
) -> Tensor:
    decided = routing(kind, weights, slots)
    permutation = dispatch.make_permutation(decided, padded)
    rows, weights_R = dispatch.permute(x, decided.weights_TE, permutation)
    # What the grouped kernel leaves in rows that no expert owns.
    garbage_R1 = torch.zeros(rows.shape[0], 1, dtype=rows.dtype)
    garbage_R1[int(permutation.counts_E.sum()) :] = float("nan")
    return dispatch.combine(experts_reference(rows, permutation.counts_E, weights_R, w1, w2) + garbage_R1, permutation)


def loop(kind: str, x: Tensor, weights: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    kept = selection(kind).tolist()
    rows = []
    for token in range(TOKENS):
        y = x[token] * 0
        for e in range(EXPERTS):
            if kept[token][e]:
                gate, up = (w1[e] @ x[token]).split(WIDTH)
                y = y + weights[token, e] * (w2[e] @ (torch.sigmoid(gate) * gate * up))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [None, EXPERTS, EXPERTS + 2])
def test_equals_a_loop_over_tokens(kind: str, slots: int | None) -> None:
    dy = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    arguments = leaves()
    got, want = fast(kind, slots, *arguments), loop(kind, *arguments)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    got_gradients = torch.autograd.grad((got * dy).sum(), arguments)
    want_gradients = torch.autograd.grad((want * dy).sum(), arguments, allow_unused=True)
    for g, w in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [TOKENS, TOKENS + 3])
def test_padded_to_equal_rows_equals_a_loop_over_tokens(kind: str, padded: int) -> None:
    dy = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    arguments = leaves()
    got, want = fast(kind, EXPERTS + 1, *arguments, padded), loop(kind, *arguments)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    got_gradients = torch.autograd.grad((got * dy).sum(), arguments)
    want_gradients = torch.autograd.grad((want * dy).sum(), arguments, allow_unused=True)
    for g, w in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_shapes_do_not_depend_on_the_selection(kind: str) -> None:
    """Also rows of zeros have weight zero; where the busiest expert has as many rows as there are, none is left."""
    decided = routing(kind, torch.rand(TOKENS, EXPERTS) + 1, EXPERTS)
    permutation = dispatch.make_permutation(decided, TOKENS)
    assert permutation.counts_E.tolist() == [TOKENS] * EXPERTS
    rows, weights_R = dispatch.permute(torch.rand(TOKENS, HIDDEN) + 1, decided.weights_TE, permutation)
    assert rows.shape == (EXPERTS * TOKENS + 1, HIDDEN)
    real_ER = (weights_R[:-1] > 0).view(EXPERTS, TOKENS)
    assert torch.equal(real_ER.sum(1), selection(kind).sum(0))
    assert not rows[:-1][~real_ER.flatten()].any() and bool((rows[:-1][real_ER.flatten()] > 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [None, EXPERTS])
def test_rows_are_sorted_by_expert_and_stable(kind: str, slots: int | None) -> None:
    kept_TE = selection(kind)
    permutation = dispatch.make_permutation(routing(kind, torch.rand(TOKENS, EXPERTS), slots))
    assert permutation.counts_E.tolist() == kept_TE.sum(0).tolist()
    owned = int(kept_TE.sum())
    expected = [token for e in range(EXPERTS) for token in kept_TE[:, e].nonzero()[:, 0].tolist()]
    assert permutation.token_R[:owned].tolist() == expected


def test_a_token_without_experts_gets_zero() -> None:
    y = fast("random", EXPERTS, *leaves())
    assert not y[3].any() and not y[-1].any() and y[0].any() == selection("random")[0].any()


def test_the_combine_weights_travel_with_the_rows() -> None:
    x, weights, _, _ = leaves()
    decided = routing("random", weights, EXPERTS)
    permutation = dispatch.make_permutation(decided)
    _, weights_R = dispatch.permute(x, decided.weights_TE, permutation)
    expected = [
        decided.weights_TE[t, e].item() for e in range(EXPERTS) for t in range(TOKENS) if selection("random")[t, e]
    ]
    assert weights_R[: len(expected)].tolist() == expected
