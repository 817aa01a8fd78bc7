from __future__ import annotations

import pytest
import torch

from moe_train.routing import DynamicKGate, DynamicKOptions


def brute_force(p, threshold, min_k, max_k):
    """min{k : sum of the k largest >= threshold}, by trying every k; then the bounds."""
    order = sorted(range(len(p)), key=lambda e: (-p[e], e))
    k = len(p)
    if threshold < 1:
        k = next((k for k in range(1, len(p) + 1) if sum(p[e] for e in order[:k]) >= threshold), len(p))
    return sorted(order[: max(min_k, min(k, max_k or len(p)))])


@pytest.mark.parametrize("max_k", [None, 3, 8])
@pytest.mark.parametrize("min_k", [1, 2])
def test_brute_force_over_thresholds(min_k, max_k, make_batch):
    batch = make_batch([16], 16)
    x_TH = torch.randn(16, 6, dtype=torch.float64) * torch.logspace(-2, 1, 16)[:, None]
    thresholds = [1e-9, 1e-3, *[i / 20 for i in range(1, 20)], 0.999, 1.0]
    for threshold in thresholds:
        gate = DynamicKGate(6, 8, DynamicKOptions(threshold, min_k, max_k)).double()
        torch.nn.init.normal_(gate.weight)
        routing = gate(x_TH, batch)
        p_TE = (x_TH @ gate.weight.detach().T).softmax(1)
        for t in range(16):
            expected = brute_force(p_TE[t].tolist(), threshold, min_k, max_k)
            assert routing.selected_TE[t].nonzero().flatten().tolist() == expected, (threshold, t)
            weights = [float(p_TE[t, e] / p_TE[t, expected].sum()) for e in expected]
            torch.testing.assert_close(routing.weights_TE[t, expected].tolist(), weights, rtol=1e-10, atol=1e-14)
        if max_k is not None:
            for t in range(16):
                used = [e for e in routing.experts_TK[t].tolist() if e < 8]
                assert sorted(used) == routing.selected_TE[t].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.5, [0]), (0.65, [0, 1]), (0.81, [0, 1, 2]), (0.95, [0, 1, 2]), (0.96, [0, 1, 2, 3])],
)
def test_the_published_off_by_one_is_not_repeated(threshold, expected, make_batch):
    """p = (.5, .3, .15, .05): the rule takes 2 experts for .65 and 3 for .95, where published code takes 1 and 2."""
    gate = DynamicKGate(1, 4, DynamicKOptions(threshold)).double()
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    with torch.no_grad():
        # A hair less for the last, so that three exceed .95 and rounding does not decide.
        gate.weight.copy_((p * torch.tensor([1.0, 1.0, 1.0, 1 - 1e-9], dtype=p.dtype)).log()[:, None])
    assert gate(torch.ones(1, 1).double(), make_batch([1], 1)).selected_TE[0].nonzero().flatten().tolist() == expected


def test_threshold_one_takes_every_expert_in_float32(make_batch):
    gate = DynamicKGate(4, 64, DynamicKOptions(1.0))
    torch.nn.init.normal_(gate.weight, std=20.0)
    assert bool(gate(torch.randn(50, 4), make_batch([50], 50)).selected_TE.all())


def test_uniform_probabilities_take_the_first_experts(make_batch):
    gate = DynamicKGate(4, 8, DynamicKOptions(0.6))
    assert gate(torch.zeros(1, 4), make_batch([1], 1)).selected_TE[0].tolist() == [True] * 5 + [False] * 3


def test_sums_of_a_varying_number_of_experts(make_batch):
    batch = make_batch([6, 2], 6)
    gate = DynamicKGate(4, 8, DynamicKOptions(0.5))
    torch.nn.init.normal_(gate.weight)
    numbers_T = gate(torch.randn(12, 4), batch).selected_TE.sum(1)
    assert bool((numbers_T[batch.padding_T] == 0).all()) and bool((numbers_T[~batch.padding_T] >= 1).all())


@pytest.mark.parametrize(
    "options", [{"threshold": 0.0}, {"threshold": 1.1}, {"min_k": 0}, {"min_k": 3, "max_k": 2}, {"threshold": -1.0}]
)
def test_bad_options(options):
    with pytest.raises(ValueError, match="min_k|threshold|max_k"):
        DynamicKOptions(**options)


def test_bounds_beyond_the_experts():
    with pytest.raises(ValueError, match="only 4 experts"):
        DynamicKGate(4, 4, DynamicKOptions(max_k=5))
    with pytest.raises(ValueError, match="only 4 experts"):
        DynamicKGate(4, 4, DynamicKOptions(min_k=5))
