from __future__ import annotations

import math

import pytest
import torch

from moe_train.routing import SoftmaxTopKGate, SoftmaxTopKOptions

VARIANTS = [("before", True), ("before", False), ("after", True), ("after", False)]


def transcription(x, weight, bias, k, softmax, renormalize, groups=1, allowed=1):
    """One token at a time, in Python floats, before scaling."""
    logits = [sum(a * b for a, b in zip(x, row, strict=True)) for row in weight]
    scores = [a + b for a, b in zip(logits, bias, strict=True)]
    size = len(scores) // groups
    best = sorted(range(groups), key=lambda g: (-max(scores[g * size : (g + 1) * size]), g))[:allowed]
    reached = [e for e in range(len(scores)) if e // size in best]
    chosen = sorted(reached, key=lambda e: (-scores[e], e))[:k]
    weights = [0.0] * len(logits)
    if softmax == "after":
        total = sum(math.exp(logits[e]) for e in chosen)
        for e in chosen:
            weights[e] = math.exp(logits[e]) / total
        return weights
    total = sum(math.exp(v) for v in logits)
    for e in chosen:
        weights[e] = math.exp(logits[e]) / total
    kept = sum(weights)
    return [w / kept for w in weights] if renormalize else weights


@pytest.mark.parametrize(("softmax", "renormalize"), VARIANTS)
@pytest.mark.parametrize("k", [2, 3, 8])
def test_equals_the_formula(softmax, renormalize, k, make_batch):
    batch = make_batch([5, 3], 5)
    gate = SoftmaxTopKGate(6, 8, SoftmaxTopKOptions(k, softmax, renormalize)).double()
    torch.nn.init.normal_(gate.weight)
    x_TH, bias_E = torch.randn(10, 6, dtype=torch.float64), torch.randn(8)
    routing = gate(x_TH, batch, bias_E=bias_E)
    for t in range(10):
        expected = transcription(x_TH[t].tolist(), gate.weight.tolist(), bias_E.tolist(), k, softmax, renormalize)
        if bool(batch.padding_T[t]):
            expected = [0.0] * 8
        torch.testing.assert_close(routing.weights_TE[t].tolist(), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(routing.logits_TE, x_TH @ gate.weight.T)
    torch.testing.assert_close(routing.probs_TE, (x_TH @ gate.weight.T).softmax(1))


@pytest.mark.usefixtures("fresh_seed")
@pytest.mark.parametrize(("softmax", "renormalize"), VARIANTS)
@pytest.mark.parametrize(("groups", "allowed"), [(4, 2), (2, 1), (8, 3)])
def test_groups_and_scaling_equal_the_formula(softmax, renormalize, groups, allowed, make_batch):
    options = SoftmaxTopKOptions(3, softmax, renormalize, scaling=2.5, num_groups=groups, groups_per_token=allowed)
    gate = SoftmaxTopKGate(6, 8, options).double()
    torch.nn.init.normal_(gate.weight)
    x_TH, bias_E = torch.randn(10, 6, dtype=torch.float64), torch.randn(8)
    routing = gate(x_TH, make_batch([10], 10), bias_E=bias_E)
    arguments = (gate.weight.tolist(), bias_E.tolist(), 3, softmax, renormalize, groups, allowed)
    for t in range(10):
        expected = [2.5 * w for w in transcription(x_TH[t].tolist(), *arguments)]
        torch.testing.assert_close(routing.weights_TE[t].tolist(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": 0.0}, "scaling is 0.0"),
        ({"num_groups": 0}, "num_groups is 0"),
        ({"num_groups": 3}, "must divide the 8 experts"),
        ({"groups_per_token": 2}, "must not be above num_groups"),
        ({"top_k": 3, "num_groups": 4}, "leaves a token 2 of 8 experts"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxTopKGate(6, 8, SoftmaxTopKOptions(**options))


@pytest.mark.parametrize(("softmax", "renormalize"), VARIANTS)
def test_weights_do_not_see_the_bias(softmax, renormalize, make_batch):
    """Row 12 (a bias that is added for selection must not weigh the experts' outputs): same selection, same weights;
    and the bias does decide the selection."""
    batch = make_batch([4], 4)
    gate = SoftmaxTopKGate(6, 8, SoftmaxTopKOptions(2, softmax, renormalize))
    x_TH = torch.randn(4, 6)
    bias_E = torch.zeros(8)
    bias_E[[3, 6]] = 10.0
    routing = gate(x_TH, batch, bias_E=bias_E)
    assert routing.selected_TE.nonzero()[:, 1].tolist() == [3, 6] * 4
    plain = gate(x_TH, batch, replay_TE=routing.selected_TE)
    assert torch.equal(plain.weights_TE, routing.weights_TE)
    assert torch.equal(plain.probs_TE, routing.probs_TE) and torch.equal(plain.logits_TE, routing.logits_TE)


def test_near_ties_are_decided_as_in_float64(make_batch):
    """Row 29 (Megatron-LM#1421, vllm PR14027, nanotron): logits 1e-4 apart, which bfloat16 arithmetic confuses."""
    batch = make_batch([256], 256)
    gate = SoftmaxTopKGate(64, 8, SoftmaxTopKOptions(2)).bfloat16()
    base = torch.randn(64)
    with torch.no_grad():
        gate.weight.copy_(base.expand(8, 64))
        gate.weight[:, 0] += torch.arange(8) * 2**-7
    x_TH = torch.randn(256, 64)
    x_TH[:, 0] = 0.01 * torch.randn(256).sign()
    x_TH = x_TH.bfloat16()
    exact_TE = x_TH.double() @ gate.weight.double().T
    expected = torch.sort(exact_TE, dim=1, descending=True, stable=True).indices[:, :2]
    assert torch.equal(gate(x_TH, batch).experts_TK, expected)
    wrong = torch.sort((x_TH @ gate.weight.T).float(), dim=1, descending=True, stable=True).indices[:, :2]
    assert not torch.equal(wrong, expected), "the inputs are no near-ties"


def test_renormalised_weights_survive_underflow(make_batch):
    batch = make_batch([1], 1)
    gate = SoftmaxTopKGate(1, 4, SoftmaxTopKOptions(2))
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([[500.0], [0.0], [0.0], [-1.0]]))
    routing = gate(torch.ones(1, 1), batch, bias_E=torch.tensor([-1000.0, 0.0, 0.0, 0.0]))
    assert routing.weights_TE.tolist() == [[0.0, 0.5, 0.5, 0.0]]


def test_one_renormalised_expert_is_refused():
    with pytest.raises(ValueError, match="no gradient"):
        SoftmaxTopKOptions(top_k=1)
    with pytest.raises(ValueError, match="no gradient"):
        SoftmaxTopKOptions(top_k=1, softmax="after", renormalize=False)
    SoftmaxTopKOptions(top_k=1, renormalize=False)
