from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml

from moe_train.routing import BalancedGate, SigmoidTopKGate, SigmoidTopKOptions
from moe_train.routing.options import BalancingOptions, BiasOptions, RouterOptions
from tests.reference.gates import decide
from tests.reference.geometry import Router

pytestmark = pytest.mark.usefixtures("fresh_seed")

HIDDEN, EXPERTS = 6, 8
VARIANTS = [
    {"top_k": 2},
    {"top_k": 3, "renormalize": False, "scaling": 0.5},
    {"top_k": 1, "renormalize": False},
    {"top_k": 8, "scaling": 2.5},
    {"top_k": 2, "num_groups": 2, "groups_per_token": 1},
    {"top_k": 3, "num_groups": 4, "groups_per_token": 2, "scaling": 2.5},
    {"top_k": 3, "num_groups": 8, "groups_per_token": 3, "renormalize": False},
    {"top_k": 4, "num_groups": 2, "groups_per_token": 2},
]


def gate_of(options, dtype=torch.float64):
    gate = SigmoidTopKGate(HIDDEN, EXPERTS, SigmoidTopKOptions(**options)).to(dtype)
    torch.nn.init.normal_(gate.weight)
    return gate


def transcription(x, weight, bias, options):
    """One token, in Python floats: selected experts by falling s + bias, and all weights."""
    scores = [1 / (1 + math.exp(-sum(a * b for a, b in zip(x, row, strict=True)))) for row in weight]
    ranked = [s + b for s, b in zip(scores, bias, strict=True)]
    groups = options.get("num_groups", 1)
    size = len(scores) // groups

    def group_score(g):
        return sum(sorted(ranked[g * size : (g + 1) * size])[-2:])

    best = sorted(range(groups), key=lambda g: (-group_score(g), g))[: options.get("groups_per_token", 1)]
    allowed = [e for e in range(len(scores)) if e // size in best]
    chosen = sorted(allowed, key=lambda e: (-ranked[e], e))[: options["top_k"]]
    total = sum(scores[e] for e in chosen) + 1e-20 if options.get("renormalize", True) else 1.0
    return chosen, [options.get("scaling", 1.0) * scores[e] / total if e in chosen else 0.0 for e in range(len(scores))]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_formula(options, biased, make_batch):
    """Pitfall 12: the bias enters the selection, and the weights are those of the raw scores."""
    batch, gate = make_batch([40, 33], 40), gate_of(options)
    x_TH = torch.randn(80, HIDDEN, dtype=torch.float64)
    bias_E = torch.randn(EXPERTS) * 0.3 if biased else None
    routing = gate(x_TH, batch, bias_E=bias_E)
    bias = bias_E.tolist() if biased else [0.0] * EXPERTS
    for t in range(80):
        chosen, weights = transcription(x_TH[t].tolist(), gate.weight.tolist(), bias, options)
        if bool(batch.padding_T[t]):
            chosen, weights = [EXPERTS] * len(chosen), [0.0] * EXPERTS
        assert routing.experts_TK[t].tolist() == chosen
        torch.testing.assert_close(routing.weights_TE[t].tolist(), weights, rtol=1e-12, atol=1e-14)
    scores_TE = torch.sigmoid(x_TH @ gate.weight.T)
    torch.testing.assert_close(routing.probs_TE, scores_TE / scores_TE.sum(1, keepdim=True))
    torch.testing.assert_close(routing.logits_TE, x_TH @ gate.weight.T)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_equals_the_reference_with_gradients(options, make_batch):
    batch, gate = make_batch([30, 21], 30), gate_of(options)
    x_TH = torch.randn(60, HIDDEN, dtype=torch.float64, requires_grad=True)
    bias_E = torch.randn(EXPERTS) * 0.3
    dw_TE, dp_TE = torch.randn(2, 60, EXPERTS, dtype=torch.float64)
    routing = gate(x_TH, batch, bias_E=bias_E)
    want = decide(Router("sigmoid_topk", options), {"weight": gate.weight}, x_TH, batch.padding_T, bias_E)
    assert torch.equal(routing.selected_TE, want.selected_NE)
    torch.testing.assert_close(routing.weights_TE, want.weights_NE, rtol=1e-12, atol=1e-14)
    found, wanted = (
        torch.autograd.grad((weights * dw_TE).sum() + (probs * dp_TE).sum(), [gate.weight, x_TH])
        for weights, probs in ((routing.weights_TE, routing.probs_TE), (want.weights_NE, want.probs_NE))
    )
    for a, b in zip(found, wanted, strict=True):
        assert bool(a.any())
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_weights_do_not_see_the_bias(options, make_batch):
    """Pitfall 12: KempnerForge docs/moe/routers.md (bias inside the sigmoid and in the combine weight). The same
    selection gives the same bits with and without a bias, also in their gradient; and the bias does decide."""
    batch, gate = make_batch([16], 16), gate_of(options, torch.float32)
    x_TH = torch.randn(16, HIDDEN)
    bias_E = torch.linspace(3.0, -3.0, EXPERTS)  # by steps of 0.86; scores are below 1
    routing = gate(x_TH, batch, bias_E=bias_E)
    if options["top_k"] < EXPERTS:
        assert not torch.equal(routing.selected_TE, gate(x_TH, batch).selected_TE)
    plain = gate(x_TH, batch, replay_TE=routing.selected_TE)
    assert torch.equal(plain.weights_TE, routing.weights_TE)
    assert torch.equal(plain.probs_TE, routing.probs_TE) and torch.equal(plain.logits_TE, routing.logits_TE)
    dw_TE = torch.randn(16, EXPERTS)
    gradients = [torch.autograd.grad((r.weights_TE * dw_TE).sum(), gate.weight)[0] for r in (plain, routing)]
    assert torch.equal(*gradients)


def scripted(scores, top_k, groups, kept, bias=None, make_batch=None):
    """Experts that one token with these sigmoid scores selects, in order."""
    gate = SigmoidTopKGate(1, len(scores), SigmoidTopKOptions(top_k, num_groups=groups, groups_per_token=kept))
    with torch.no_grad():
        gate.weight.copy_(torch.tensor(scores).logit()[:, None])
    bias_E = None if bias is None else torch.tensor(bias)
    return gate(torch.ones(1, 1), make_batch([1], 1), bias_E=bias_E).experts_TK[0].tolist()


class TestGroups:
    def test_two_largest_decide_and_not_the_largest(self, make_batch):
        scores = [0.9, 0.1, 0.1, 0.6, 0.5, 0.1]  # groups of three: 0.9 + 0.1 against 0.6 + 0.5
        assert scripted(scores, 2, 2, 1, make_batch=make_batch) == [3, 4]

    def test_third_and_further_experts_do_not_count(self, make_batch):
        scores = [0.5, 0.5, 0.49, 0.49, 0.6, 0.45, 0.01, 0.01]
        assert scripted(scores, 3, 2, 1, make_batch=make_batch) == [4, 5, 6]

    def test_the_bias_moves_groups(self, make_batch):
        scores = [0.9, 0.8, 0.2, 0.1]
        assert scripted(scores, 2, 2, 1, make_batch=make_batch) == [0, 1]
        assert scripted(scores, 2, 2, 1, [0.0, 0.0, 0.9, 0.9], make_batch=make_batch) == [2, 3]

    def test_experts_of_other_groups_stay_out_however_low_the_scores(self, make_batch):
        """Masked experts rank below all others, also below negative s + bias (a mask of 0 would not)."""
        scores, bias = [0.5, 0.5, 0.5, 0.5], [-2.0, -3.0, -9.0, -9.0]
        assert scripted(scores, 2, 2, 1, bias, make_batch=make_batch) == [0, 1]

    def test_groups_of_one_expert_count_with_that_one(self, make_batch):
        scores = [0.3, 0.9, 0.5, 0.7]
        assert scripted(scores, 2, 4, 3, make_batch=make_batch) == [1, 3]

    def test_ties_go_to_the_lower_group_and_expert(self, make_batch):
        """Pitfalls 27 and 28."""
        assert scripted([0.5] * 8, 3, 4, 2, make_batch=make_batch) == [0, 1, 2]
        assert scripted([0.1, 0.2, 0.7, 0.4, 0.4, 0.7, 0.1, 0.2], 2, 4, 1, make_batch=make_batch) == [2, 3]

    def test_all_groups_allowed_is_no_restriction(self, make_batch):
        batch, x_TH = make_batch([50], 50), torch.randn(50, HIDDEN)
        gate = gate_of({"top_k": 3}, torch.float32)
        grouped = SigmoidTopKGate(HIDDEN, EXPERTS, SigmoidTopKOptions(3, num_groups=4, groups_per_token=4))
        grouped.load_state_dict(gate.state_dict())
        assert torch.equal(gate(x_TH, batch).experts_TK, grouped(x_TH, batch).experts_TK)


def test_recomputation_does_not_choose_groups_again(make_batch):
    """Pitfall 27: a replayed selection across groups that the gate would not keep is used as it is."""
    batch = make_batch([4], 4)
    gate = gate_of({"top_k": 2, "num_groups": 4, "groups_per_token": 1}, torch.float32)
    replay_TE = torch.zeros(4, EXPERTS, dtype=torch.bool)
    replay_TE[:, [1, 6]] = True
    routing = gate(torch.randn(4, HIDDEN), batch, replay_TE=replay_TE)
    assert torch.equal(routing.selected_TE, replay_TE) and torch.equal(routing.weights_TE > 0, replay_TE)
    assert all(sorted(row) == [1, 6] for row in routing.experts_TK.tolist())


def test_scores_that_underflow_stay_finite(make_batch):
    """All sigmoids are 0 in float32: no weight, as in the published model, and a distribution all the same."""
    batch = make_batch([1], 1)
    gate = SigmoidTopKGate(1, 4)
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([[-200.0], [-201.0], [-300.0], [-300.0]]))
    routing = gate(torch.ones(1, 1), batch)
    assert routing.selected_TE.tolist() == [[True, True, False, False]] and not bool(routing.weights_TE.any())
    torch.testing.assert_close(routing.probs_TE[0, :2], torch.tensor([0.0, -1.0]).softmax(0))
    (routing.weights_TE.sum() + routing.probs_TE[0, 0]).backward()
    assert torch.isfinite(gate.weight.grad).all()


def test_bias_balances_groups_towards_a_target(make_batch):
    """The loop of a training run without its optimizer: loads come near their shares."""
    batch, x_TH = make_batch([256], 256), torch.randn(256, HIDDEN) + 0.5
    target = [2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5]
    options = {"top_k": 2, "num_groups": 4, "groups_per_token": 2}
    router = RouterOptions("sigmoid_topk", options, BalancingOptions(bias=BiasOptions(0.01, target_load=target)))
    gate = BalancedGate(router, HIDDEN, EXPERTS)
    torch.nn.init.normal_(gate.gate.weight)

    def distance(load_E):
        return float((load_E / load_E.sum() - torch.tensor(target) / 8).abs().sum())

    first = distance(gate(x_TH, batch).sums["load"])
    for _ in range(300):
        gate.after_step(gate(x_TH, batch).sums)
    loads = []
    for _ in range(20):  # the sign rule swings around the target
        loads.append(gate(x_TH, batch).sums["load"])
        gate.after_step(gate(x_TH, batch).sums)
    assert distance(torch.stack(loads).double().mean(0)) < min(0.1, first / 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 1}, "no gradient"),
        ({"scaling": 0.0}, "scaling is 0.0"),
        ({"scaling": float("nan")}, "scaling is nan"),
        ({"scaling": float("inf")}, "scaling is inf"),
        ({"num_groups": 0}, "num_groups is 0"),
        ({"groups_per_token": 0}, "groups_per_token is 0"),
        ({"groups_per_token": 2}, "must not be above num_groups"),
        ({"top_k": 9}, "only 8 experts"),
        ({"num_groups": 3}, "must divide the 8 experts"),
        ({"top_k": 3, "num_groups": 4}, "leaves a token 2 of 8 experts"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gate_of(options)
    gate_of({"top_k": 1, "renormalize": False})


def test_shipped_part_is_this_gate_with_a_bias():
    path = Path(__file__).parents[3] / "configs" / "router" / "sigmoid_topk.yaml"
    router = yaml.safe_load(path.read_text())["router"]
    assert router["gate"] == "sigmoid_topk" and router["balancing"]["bias"]["rate"] > 0
    gate_of(router["options"])
