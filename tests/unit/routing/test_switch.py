from __future__ import annotations

import math

import pytest
import torch

from moe_train.routing import SwitchGate, SwitchOptions


def transcription(x, weight, bias):
    """One token, in Python floats: eq. 1 and 2 of the paper, k = 1."""
    logits = [sum(a * b for a, b in zip(x, row, strict=True)) for row in weight]
    best = max(range(len(logits)), key=lambda e: (logits[e] + bias[e], -e))
    total = sum(math.exp(v) for v in logits)
    return [math.exp(logits[e]) / total if e == best else 0.0 for e in range(len(logits))]


@pytest.mark.usefixtures("fresh_seed")
def test_equals_the_formula(make_batch):
    batch = make_batch([5, 3], 5)
    gate = SwitchGate(6, 8).double()
    torch.nn.init.normal_(gate.weight)
    x_TH, bias_E = torch.randn(10, 6, dtype=torch.float64), torch.randn(8)
    routing = gate(x_TH, batch, bias_E=bias_E)
    for t in range(10):
        expected = transcription(x_TH[t].tolist(), gate.weight.tolist(), bias_E.tolist())
        if bool(batch.padding_T[t]):
            expected = [0.0] * 8
        torch.testing.assert_close(routing.weights_TE[t].tolist(), expected, rtol=1e-12, atol=1e-14)


def test_the_weight_is_the_probability_so_that_the_gate_learns(make_batch):
    """The trap of a renormalised top-1: weight 1 and no gradient."""
    gate = SwitchGate(6, 8)
    routing = gate(torch.randn(4, 6), make_batch([4], 4))
    assert bool((routing.weights_TE.sum(1) < 0.99).all())
    routing.weights_TE.sum().backward()
    assert bool(gate.weight.grad.any())


def test_jitter_is_uniform_around_one_and_for_training_alone(make_batch):
    """[1 - eps, 1 + eps] for every element of x, another number in every step, the same in recomputation; and none in
    evaluation."""
    tokens, hidden = 500, 20
    gate = SwitchGate(hidden, 20, SwitchOptions(jitter=0.1))
    with torch.no_grad():
        gate.weight.copy_(torch.eye(20))
    ones = torch.ones(tokens, hidden)
    factors = gate(ones, make_batch([tokens], tokens, step=3)).logits_TE.detach()
    assert float(factors.min()) >= 0.9 and float(factors.max()) <= 1.1
    counts = torch.histc(factors, 10, 0.9, 1.1) / factors.numel()
    assert bool((counts > 0.09).all() and (counts < 0.11).all())
    assert torch.equal(factors, gate(ones, make_batch([tokens], tokens, step=3)).logits_TE)
    assert not torch.equal(factors, gate(ones, make_batch([tokens], tokens, step=4)).logits_TE)
    assert torch.equal(gate.eval()(ones, make_batch([tokens], tokens, step=3)).logits_TE, ones)


@pytest.mark.parametrize("jitter", [-0.1, 1.0, float("nan")])
def test_impossible_options(jitter):
    with pytest.raises(ValueError, match="jitter is"):
        SwitchOptions(jitter=jitter)
