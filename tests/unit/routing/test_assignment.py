from __future__ import annotations

import itertools

import pytest
import torch

from moe_train.routing.gates.assignment import balanced_assignment


def best_total(scores_ME):
    """By trying every even assignment."""
    tokens, experts = scores_ME.shape
    few, many = tokens // experts, -(-tokens // experts)
    best = float("-inf")
    for choice in itertools.product(range(experts), repeat=tokens):
        if all(few <= choice.count(e) <= many for e in range(experts)):
            best = max(best, sum(float(scores_ME[m, e]) for m, e in enumerate(choice)))
    return best


def check(scores_PME, padding_PM):
    expert_PM = balanced_assignment(scores_PME, padding_PM)
    experts = scores_PME.shape[2]
    for scores_ME, padding_M, expert_M in zip(scores_PME, padding_PM, expert_PM, strict=True):
        assert bool((expert_M[padding_M] == experts).all())
        real_ME, chosen_M = scores_ME[~padding_M], expert_M[~padding_M]
        load = torch.bincount(chosen_M, minlength=experts)
        assert len(load) == experts and int(load.max() - load.min()) <= 1
        total = float(real_ME[torch.arange(len(real_ME)), chosen_M].sum())
        assert total == pytest.approx(best_total(real_ME), abs=1e-8)


@pytest.mark.parametrize(
    ("tokens", "experts"), [(1, 1), (1, 4), (3, 4), (4, 4), (5, 2), (6, 3), (7, 3), (9, 2), (5, 5)]
)
def test_no_assignment_is_better(tokens, experts, fresh_seed):
    scores_PME = torch.randn(4, tokens, experts, dtype=torch.float64)
    scores_PME[1] = scores_PME[1].round()  # with ties
    scores_PME[2, :, 0] += 5.0  # all want one expert
    check(scores_PME, torch.rand(4, tokens) < torch.tensor([0.0, 0.0, 0.0, 0.4])[:, None])


def test_no_exchange_of_a_large_assignment_is_better(fresh_seed):
    """Optimal if and only if no cycle of exchanges gains: shortest cycles by Floyd and Warshall, with an own count."""
    scores_ME = torch.randn(200, 8, dtype=torch.float64) + torch.randn(8, dtype=torch.float64)
    expert_M = balanced_assignment(scores_ME[None], torch.zeros(1, 200, dtype=torch.bool))[0]
    assert torch.bincount(expert_M).tolist() == [25] * 8
    gain = [[0.0] * 8 for _ in range(8)]
    for e, f in itertools.permutations(range(8), 2):
        gain[e][f] = min(float(scores_ME[m, e] - scores_ME[m, f]) for m in range(200) if expert_M[m] == e)
    for k, e, f in itertools.product(range(8), repeat=3):
        gain[e][f] = min(gain[e][f], gain[e][k] + gain[k][f])
    assert all(gain[e][e] > -1e-8 for e in range(8))


def test_equal_scores_and_nothing_but_padding():
    expert_PM = balanced_assignment(torch.zeros(2, 10, 4), torch.tensor([[False] * 10, [True] * 10]))
    assert sorted(torch.bincount(expert_PM[0]).tolist()) == [2, 2, 3, 3] and expert_PM[1].tolist() == [4] * 10


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_and_shift_of_scores_change_nothing(scale, fresh_seed):
    scores_PME = torch.randn(1, 30, 4, dtype=torch.float64)
    padding_PM = torch.zeros(1, 30, dtype=torch.bool)
    want = balanced_assignment(scores_PME, padding_PM)
    assert torch.equal(balanced_assignment(scores_PME * scale, padding_PM), want)
    assert torch.equal(balanced_assignment(scores_PME + torch.randn(1, 30, 1).double(), padding_PM), want)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_end(value):
    """The trainer refuses the step afterwards; a search without end would hide that."""
    scores_PME = torch.randn(1, 12, 4)
    scores_PME[0, 5, 2] = value
    expert_PM = balanced_assignment(scores_PME, torch.zeros(1, 12, dtype=torch.bool))
    assert torch.bincount(expert_PM[0], minlength=4).tolist() == [3, 3, 3, 3]
