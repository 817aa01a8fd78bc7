from __future__ import annotations

import math

import pytest
import torch

from moe_train.routing import GShardGate, GShardOptions, TokenBatch


def transcription(x, weight, takes_second):
    """One token, in Python floats: algorithm 1 without capacity. ``takes_second`` decides from g2."""
    logits = [sum(a * b for a, b in zip(x, row, strict=True)) for row in weight]
    total = sum(math.exp(v) for v in logits)
    g = [math.exp(v) / total for v in logits]
    e1 = max(range(len(g)), key=lambda e: g[e])
    e2 = max((e for e in range(len(g)) if e != e1), key=lambda e: g[e])
    g1, g2 = g[e1] / (g[e1] + g[e2]), g[e2] / (g[e1] + g[e2])
    weights = [0.0] * len(g)
    weights[e1] = g1
    if takes_second(g2):
        weights[e2] = g2
    return weights, g2


def gate_of(**options):
    gate = GShardGate(6, 8, GShardOptions(**options)).double()
    torch.nn.init.normal_(gate.weight, std=0.5)
    return gate


POLICIES = [
    ({"second": "all"}, True, lambda g2: True),
    ({"second": "none"}, True, lambda g2: False),
    ({"second": "threshold", "threshold": 0.3}, True, lambda g2: g2 > 0.3),
    ({"second": "random"}, False, lambda g2: True),
    ({"second_in_evaluation": "none"}, False, lambda g2: False),
    ({"second_in_evaluation": "threshold", "threshold": 0.3}, False, lambda g2: g2 > 0.3),
]


@pytest.mark.usefixtures("fresh_seed")
@pytest.mark.parametrize(("options", "training", "rule"), POLICIES)
def test_equals_the_formula(options, training, rule, make_batch):
    """The weights are normalised over both before the second is dropped: g1 alone stays below 1."""
    batch = make_batch([20, 12], 20)
    gate = gate_of(**options).train(training)
    x_TH = torch.randn(40, 6, dtype=torch.float64)
    routing = gate(x_TH, batch)
    for t in range(40):
        expected, _ = transcription(x_TH[t].tolist(), gate.weight.tolist(), rule)
        if bool(batch.padding_T[t]):
            expected = [0.0] * 8
        torch.testing.assert_close(routing.weights_TE[t].tolist(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_the_second_is_taken_as_often_as_the_rule_says(threshold, make_batch):
    """2 g2 in the paper; min(1, g2 / 0.2) in Mesh TensorFlow and system 004."""
    torch.manual_seed(3)
    tokens = 20000
    gate = gate_of(threshold=threshold)
    x_TH = torch.randn(1, 6, dtype=torch.float64).expand(tokens, 6)
    while not 0.12 < transcription(x_TH[0].tolist(), gate.weight.tolist(), bool)[1] < 0.17:
        torch.nn.init.normal_(gate.weight, std=0.5)
    _, g2 = transcription(x_TH[0].tolist(), gate.weight.tolist(), bool)
    taken_T = gate(x_TH, make_batch([tokens], tokens)).selected_TE.sum(1) == 2
    wanted = min(1.0, g2 / threshold)
    assert abs(float(taken_T.double().mean()) - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / tokens)


def test_a_share_above_the_threshold_is_always_taken(make_batch):
    gate = gate_of(threshold=0.2)
    with torch.no_grad():
        gate.weight[1:] = gate.weight[0] - 1e-3 * torch.randn(7, 6, dtype=torch.float64)  # all shares near 0.5
    routing = gate(torch.randn(200, 6, dtype=torch.float64), make_batch([200], 200))
    assert bool((routing.selected_TE.sum(1) == 2).all())


def test_the_draw_belongs_to_the_token_and_the_step(make_batch):
    gate = gate_of()
    x_TH = torch.randn(200, 6, dtype=torch.float64)
    first, again, later = (gate(x_TH, make_batch([200], 200, step=step)).selected_TE for step in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert set(first.sum(1).tolist()) == {1, 2}


def test_a_share_of_zero_never_wins_by_lot(make_batch, monkeypatch):
    """With the least noise there is, whose distribution function is 0 in float32."""
    least = lambda self, name, layer, shape: torch.full((self.ids_T.numel(), *shape), -6.76)  # noqa: E731
    monkeypatch.setattr(TokenBatch, "noise", least)
    gate = GShardGate(1, 3)
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([[300.0], [0.0], [-1.0]]))
    routing = gate(torch.ones(2, 1), make_batch([2], 2))
    assert routing.selected_TE.tolist() == [[True, False, False]] * 2


def test_one_expert_still_has_a_gradient(make_batch):
    gate = gate_of(second="none")
    gate(torch.randn(4, 6, dtype=torch.float64), make_batch([4], 4)).weights_TE.sum().backward()
    assert bool(gate.weight.grad.any())


@pytest.mark.parametrize("second", ["random", "all", "none"])
def test_never_a_second_means_one_place(second, make_batch):
    """Only where neither mode takes one; that place is the first choice's, with the weight that it has beside both."""
    gate, batch = gate_of(second=second, second_in_evaluation="none"), make_batch([9], 9)
    assert gate.max_k == (1 if second == "none" else 2)
    assert gate.varies_k == (second != "none") and gate.mean_k == (1.0 if second == "none" else None)
    x_TH = torch.randn(9, 6, dtype=torch.float64)
    for training in (True, False):
        routing = gate.train(training)(x_TH, batch)
        assert routing.experts_TK.shape == (9, gate.max_k)
        assert torch.equal(routing.experts_TK[:, 0], routing.logits_TE.argmax(1))
    assert bool((routing.selected_TE.sum(1) == 1).all()) and bool((routing.weights_TE.sum(1) < 1).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"second": "threshold"}, "never exceeds 0.5"),
        ({"second_in_evaluation": "threshold", "threshold": 0.7}, "never exceeds 0.5"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        GShardOptions(**options)


def test_two_experts_at_least():
    with pytest.raises(ValueError, match="only 1"):
        GShardGate(6, 1)
