from __future__ import annotations

import pytest
import torch

from moe_train.routing import SimBalGate, SimBalOptions, SoftmaxTopKGate, SoftmaxTopKOptions
from moe_train.routing.schedule import Ramp


def transcription(weight):
    """sum over i, j of |w_i . w_j - [i = j]|, in Python floats."""
    total = 0.0
    for i, a in enumerate(weight):
        for j, b in enumerate(weight):
            total += abs(sum(x * y for x, y in zip(a, b, strict=True)) - (i == j))
    return total


def loss_of(gate, batch, x_TH):
    term = gate(x_TH, batch).losses["simbal"]
    return term.sum / term.count


@pytest.mark.usefixtures("fresh_seed")
def test_the_loss_equals_the_formula_whatever_the_tokens(make_batch):
    gate = SimBalGate(6, 8).double()
    torch.nn.init.normal_(gate.weight)
    want = transcription(gate.weight.tolist())
    for lengths in ([5, 3], [1]):
        batch = make_batch(lengths, 5)
        x_TH = torch.randn(5 * len(lengths), 6, dtype=torch.float64)
        torch.testing.assert_close(float(loss_of(gate, batch, x_TH)), want, rtol=1e-12, atol=0)


def test_it_routes_as_softmax_topk(make_batch):
    batch = make_batch([5, 3], 5)
    plain = SoftmaxTopKGate(16, 8, SoftmaxTopKOptions(3, renormalize=False))
    gate = SimBalGate(16, 8, SimBalOptions(3, renormalize=False))
    plain.weight.data.copy_(gate.weight.data)
    x_TH = torch.randn(10, 16)
    assert torch.equal(gate(x_TH, batch).weights_TE, plain(x_TH, batch).weights_TE)


def test_it_starts_orthonormal(make_batch):
    """At H >= E the loss starts at 0 up to rounding, and has a finite gradient there."""
    gate = SimBalGate(16, 8)
    gate.weight.data.copy_(gate.initial("weight", (8, 16), torch.Generator().manual_seed(1)))
    torch.testing.assert_close(gate.weight @ gate.weight.T, torch.eye(8), rtol=0, atol=1e-6)
    loss = loss_of(gate, make_batch([4], 4), torch.randn(4, 16))
    loss.backward()
    assert float(loss.detach()) < 1e-4 and bool(torch.isfinite(gate.weight.grad).all())
    other = gate.initial("weight", (8, 16), torch.Generator().manual_seed(2))
    assert not torch.equal(other, gate.weight)


def test_the_loss_leads_to_orthonormal_rows(make_batch):
    """Gradient steps on the loss alone, from random rows."""
    torch.manual_seed(2)
    gate, batch, x_TH = SimBalGate(16, 8), make_batch([4], 4), torch.randn(4, 16)
    torch.nn.init.normal_(gate.weight, std=0.3)
    start = float(loss_of(gate, batch, x_TH).detach())
    for step in range(200):
        (gradient,) = torch.autograd.grad(loss_of(gate, batch, x_TH), [gate.weight])
        with torch.no_grad():
            gate.weight -= 0.01 * (1 - step / 200) * gradient
    assert float(loss_of(gate, batch, x_TH).detach()) < 0.1 * start


def test_similar_tokens_have_similar_scores(make_batch):
    """What the method is named for: inside the span of the rows, products of tokens are those of their scores."""
    gate = SimBalGate(16, 16).double()
    x_TH = torch.randn(6, 16, dtype=torch.float64)
    logits_TE = gate(x_TH, make_batch([6], 6)).logits_TE
    torch.testing.assert_close(logits_TE @ logits_TE.T, x_TH @ x_TH.T, rtol=1e-5, atol=1e-5)


def test_the_coefficient_may_be_scheduled(make_batch):
    gate = SimBalGate(16, 8, SimBalOptions(coefficient=Ramp(0.4, 0.0, 4)))
    for step, want in ((0, 0.4), (3, 0.1), (9, 0.0)):
        batch = make_batch([4], 4, step=step)
        assert gate(torch.randn(4, 16), batch).losses["simbal"].coefficient == pytest.approx(want)
    gate = SimBalGate(16, 8, SimBalOptions(coefficient=0.0))
    assert not gate(torch.randn(4, 16), make_batch([4], 4)).losses


@pytest.mark.parametrize(
    ("options", "message"),
    [({"coefficient": -0.1}, "coefficient is -0.1"), ({"top_k": 1}, "no gradient"), ({"top_k": 9}, "only 8 experts")],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        SimBalGate(16, 8, SimBalOptions(**options))
