from __future__ import annotations

import pytest
import torch

from moe_train.routing import DynamicKGate, DynamicKOptions, build_gate
from moe_train.routing.schedule import Ramp, value_at


def brute_force(p, threshold, min_k=1, max_k=None, mode="paper"):
    """min{k : sum of the k largest >= threshold}, by trying every k, or the first and all others whose sum with what
    comes before them is below the threshold; then the bounds."""
    order = sorted(range(len(p)), key=lambda e: (-p[e], e))
    k = len(p)
    if threshold < 1:
        k = next((k for k in range(1, len(p) + 1) if sum(p[e] for e in order[:k]) >= threshold), len(p))
    if mode == "published":
        below = [j for j in range(1, len(p)) if threshold == 1 or sum(p[e] for e in order[:j]) < threshold]
        k = max(1, len(below))
    return sorted(order[: max(min_k, min(k, max_k or len(p)))])


@pytest.mark.usefixtures("fresh_seed")
@pytest.mark.parametrize("mode", ["paper", "published"])
@pytest.mark.parametrize("max_k", [None, 3, 8])
@pytest.mark.parametrize("min_k", [1, 2])
def test_brute_force_over_thresholds(min_k, max_k, mode, make_batch):
    batch = make_batch([16], 16)
    x_TH = torch.randn(16, 6, dtype=torch.float64) * torch.logspace(-2, 1, 16)[:, None]
    thresholds = [1e-9, 1e-3, *[i / 20 for i in range(1, 20)], 0.999, 1.0]
    for threshold in thresholds:
        gate = DynamicKGate(6, 8, DynamicKOptions(threshold, min_k, max_k, mode)).double()
        torch.nn.init.normal_(gate.weight)
        routing = gate(x_TH, batch)
        p_TE = (x_TH @ gate.weight.detach().T).softmax(1)
        for t in range(16):
            expected = brute_force(p_TE[t].tolist(), threshold, min_k, max_k, mode)
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


@pytest.mark.usefixtures("fresh_seed")
def test_almost_no_threshold_takes_one_and_the_highest_all(make_batch):
    x_TH, batch = torch.randn(50, 4), make_batch([50], 50)
    torch_k = {}
    for mode in ("paper", "published"):
        for threshold in (1e-12, 1.0):
            gate = DynamicKGate(4, 8, DynamicKOptions(threshold, mode=mode))
            torch.nn.init.ones_(gate.weight)
            torch_k[mode, threshold] = set(gate(x_TH, batch).selected_TE.sum(1).tolist())
    assert torch_k == {("paper", 1e-12): {1}, ("paper", 1.0): {8}, ("published", 1e-12): {1}, ("published", 1.0): {7}}


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.4, [0]), (0.65, [0]), (0.81, [0, 1]), (0.96, [0, 1, 2]), (1.0, [0, 1, 2])]
)
def test_published_mode_takes_one_expert_fewer(threshold, expected, make_batch):
    """p = (.5, .3, .15, .05): the last expert never, not even with 1."""
    gate = DynamicKGate(1, 4, DynamicKOptions(threshold, mode="published")).double()
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()[:, None])
    assert gate(torch.ones(1, 1).double(), make_batch([1], 1)).selected_TE[0].nonzero().flatten().tolist() == expected


def test_a_threshold_that_changes(make_batch):
    """By the steps taken, which are state: evaluation and a gate that is loaded have the threshold of their step,
    whatever step the batch says."""
    ramp, batch = {"start": 0.95, "end": 0.2, "steps": 4, "first_step": 1}, make_batch([40], 40)
    torch.manual_seed(0)
    gate, x_TH = build_gate("dynamic_k", {"threshold": ramp}, 6, 8).double(), torch.randn(40, 6).double()
    torch.nn.init.normal_(gate.weight)
    for step in range(7):
        want = build_gate("dynamic_k", {"threshold": value_at(Ramp(**ramp), step)}, 6, 8).double()
        want.weight.data.copy_(gate.weight)
        loaded = build_gate("dynamic_k", {"threshold": ramp}, 6, 8).double()
        loaded.load_state_dict(gate.state_dict())
        expected = want(x_TH, batch).selected_TE
        for one in (gate, gate.eval(), loaded, gate.to(torch.bfloat16).double().train()):
            assert int(one.steps_taken) == step and one.steps_taken.dtype == torch.int64
            if one.weight.equal(want.weight):  # not rounded to bfloat16 by the last one
                assert torch.equal(one(x_TH, batch).selected_TE, expected), step
        gate.weight.data.copy_(want.weight)
        gate.after_step({})
    assert "steps_taken" not in DynamicKGate(6, 8).state_dict()


def test_a_ramp_that_reaches_one_takes_every_expert_in_float32(make_batch):
    gate = build_gate("dynamic_k", {"threshold": {"start": 0.5, "end": 1.0, "steps": 1}}, 4, 64)
    torch.nn.init.normal_(gate.weight, std=20.0)
    x_TH, batch = torch.randn(50, 4), make_batch([50], 50)
    assert not bool(gate(x_TH, batch).selected_TE.all())
    gate.after_step({})
    assert bool(gate(x_TH, batch).selected_TE.all())


def test_sums_of_a_varying_number_of_experts(make_batch):
    batch = make_batch([6, 2], 6)
    gate = DynamicKGate(4, 8, DynamicKOptions(0.5))
    torch.nn.init.normal_(gate.weight)
    numbers_T = gate(torch.randn(12, 4), batch).selected_TE.sum(1)
    assert bool((numbers_T[batch.padding_T] == 0).all()) and bool((numbers_T[~batch.padding_T] >= 1).all())


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.0},
        {"threshold": 1.1},
        {"min_k": 0},
        {"min_k": 3, "max_k": 2},
        {"threshold": -1.0},
        {"threshold": Ramp(start=0.5, end=0.0)},
        {"threshold": Ramp(start=1.5, end=0.5)},
    ],
)
def test_bad_options(options):
    with pytest.raises(ValueError, match="min_k|threshold|max_k"):
        DynamicKOptions(**options)


def test_bounds_beyond_the_experts():
    with pytest.raises(ValueError, match="only 4 experts"):
        DynamicKGate(4, 4, DynamicKOptions(max_k=5))
    with pytest.raises(ValueError, match="only 4 experts"):
        DynamicKGate(4, 4, DynamicKOptions(min_k=5))


def test_one_expert_for_every_token_is_refused():
    with pytest.raises(ValueError, match="no gradient"):
        DynamicKOptions(max_k=1)
