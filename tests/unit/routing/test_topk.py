"""Rows 27 and 28 of the list of known bugs: ties resolve to the lower expert index, always."""

from __future__ import annotations

import pytest
import torch

from moe_train.routing.topk import mask_of, top_k, top_k_reference

INF = float("inf")


def by_hand(row, k, among=None):
    def place(e):
        last = among is not None and not among[e]
        return last, 0 if last else -row[e], e

    return sorted(range(len(row)), key=place)[:k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 16])
def test_equals_a_sort_by_hand_on_many_ties(dtype, k):
    scores_TE = torch.randint(-2, 3, (200, 16)).to(dtype) * 0.5
    scores_TE[::7, 3] = INF
    scores_TE[::5, 4] = -INF
    among_TE = torch.rand(200, 16) < 0.4
    for among in (None, among_TE):
        found = top_k(scores_TE, k, among)
        assert torch.equal(found, top_k_reference(scores_TE, k, among))
        for t in range(200):
            assert found[t].tolist() == by_hand(scores_TE[t].tolist(), k, None if among is None else among[t].tolist())


@pytest.mark.parametrize("k", [1, 4, 8])
def test_random_scores_equal_the_reference(k):
    scores_TE = torch.randn(500, 16) * 10 ** torch.randint(-30, 30, (500, 1)).float()
    assert torch.equal(top_k(scores_TE, k), top_k_reference(scores_TE, k))
    assert torch.equal(scores_TE.gather(1, top_k(scores_TE, k)), scores_TE.topk(k).values)


def test_signed_zeros_tie_and_extremes_order():
    top, small = torch.finfo(torch.float32).max, 1e-45
    row = torch.tensor([[-0.0, 0.0, -small, small, -top, top, -INF, INF]])
    assert top_k(row, 8).tolist() == [[7, 5, 3, 0, 1, 2, 4, 6]]
    assert top_k(torch.tensor([[0.0, -0.0]]), 1).tolist() == top_k(torch.tensor([[-0.0, 0.0]]), 1).tolist() == [[0]]
    assert top_k(torch.full((1, 9), -INF), 2).tolist() == [[0, 1]]


def test_does_not_write_to_its_input_and_needs_no_gradient():
    scores_TE = torch.tensor([[-0.0, 1.0, 0.0]], requires_grad=True)
    assert not top_k(scores_TE, 2).requires_grad
    assert torch.signbit(scores_TE[0, 0])


def test_non_contiguous_scores():
    scores_TE = torch.randn(16, 40).t()
    assert torch.equal(top_k(scores_TE, 3), top_k_reference(scores_TE, 3))


def test_mask():
    assert mask_of(torch.tensor([[2, 0], [1, 3]]), 4).int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
