from __future__ import annotations

import pytest
import torch

from moe_train.routing import BalancedGate, ReLUGate, ReLUOptions
from moe_train.routing.options import RouterOptions


def dot(x, row):
    return sum(a * b for a, b in zip(x, row, strict=True))


def gate_of(**options):
    gate = ReLUGate(6, 8, ReLUOptions(**options)).double()
    torch.nn.init.normal_(gate.weight)
    return gate


@pytest.mark.usefixtures("fresh_seed")
@pytest.mark.parametrize("balanced", [True, False])
def test_weights_and_loss_equal_the_formulas(balanced, make_batch):
    """R = ReLU(W x), and the L1 of each sequence, weighted with f_e = E / (k T) * load_e or not."""
    batch = make_batch([5, 3], 5)
    gate = gate_of(mean_k=3, balanced=balanced, initial_coefficient=0.5)
    x_TH = torch.randn(10, 6, dtype=torch.float64)
    routing = gate(x_TH, batch)
    relu = [[max(0.0, dot(x, row)) for row in gate.weight.tolist()] for x in x_TH.tolist()]
    for t in range(10):
        expected = [0.0] * 8 if bool(batch.padding_T[t]) else relu[t]
        torch.testing.assert_close(routing.weights_TE[t].tolist(), expected, rtol=1e-12, atol=1e-14)
        assert routing.selected_TE[t].tolist() == [v > 0 for v in expected]
    wanted = 0.0
    for sequence, tokens in ((0, 5), (1, 3)):
        rows = [relu[position * 2 + sequence] for position in range(tokens)]
        for e in range(8):
            f = 8 / (3 * tokens) * sum(row[e] > 0 for row in rows) if balanced else 1.0
            wanted += f * sum(row[e] for row in rows) / tokens
    term = routing.losses["relu_l1"]
    assert term.unit == "sequence" and int(term.count) == 2 and term.coefficient == 1.0
    torch.testing.assert_close(float(term.sum), 0.5 * wanted, rtol=1e-7, atol=0)


def test_it_is_continuous(make_batch):
    """What ReLU routing is for: an expert comes and goes with weight 0 (softmax top-k jumps)."""
    gate = gate_of()
    x_TH = torch.randn(1, 6, dtype=torch.float64)
    with torch.no_grad():
        gate.weight[0] -= (gate.weight[0] @ x_TH[0]) / x_TH.square().sum() * x_TH[0]
        gate.weight[0] += 1e-9 * x_TH[0]
    some = gate(x_TH, make_batch([1], 1))
    with torch.no_grad():
        gate.weight[0] -= 2e-9 * x_TH[0]
    other = gate(x_TH, make_batch([1], 1))
    assert bool(some.selected_TE[0, 0]) and not bool(other.selected_TE[0, 0])
    assert float((some.weights_TE - other.weights_TE).abs().max()) < 1e-7


def sums_of(load, tokens):
    return {"load": torch.tensor(load), "tokens": torch.tensor(tokens)}


def test_the_coefficient_moves_by_exact_counts():
    gate = gate_of(mean_k=2, initial_coefficient=1e-3, multiplier=1.5)
    gate.after_step(sums_of([1000, 1001], 1000))
    assert float(gate.coefficient) == pytest.approx(1.5e-3)
    gate.after_step(sums_of([1000, 1000], 1000))  # exactly the target: sign(0)
    assert float(gate.coefficient) == pytest.approx(1.5e-3)
    gate.after_step(sums_of([2**40, 2**40 - 1], 2**40))  # beyond what float32 counts
    assert float(gate.coefficient) == pytest.approx(1e-3)
    gate.after_step(sums_of([0, 0], 0))  # a step without tokens
    assert float(gate.coefficient) == pytest.approx(1e-3)


def test_the_coefficient_comes_back_from_its_bounds():
    gate = gate_of(initial_coefficient=1e-8, multiplier=1e10)
    for _ in range(9):
        gate.after_step(sums_of([1], 1000))
    assert float(gate.coefficient) == pytest.approx(1e-30)
    for _ in range(9):
        gate.after_step(sums_of([5000], 1000))
    assert 1e29 < float(gate.coefficient) < float("inf")


def test_it_steers_to_the_wanted_mean(make_batch):
    """Plain gradient steps on the loss and nothing else: from half of the experts to mean_k, and held there."""
    torch.manual_seed(0)
    batch = make_batch([128], 128)
    gate = BalancedGate(RouterOptions("relu", {"mean_k": 2, "initial_coefficient": 1e-3}), 16, 16)
    x_TH = torch.randn(128, 16)
    x_TH[:, 0] = 4.0  # around a mean of zero a linear map is positive half of the time, whatever it is
    mean_k = []
    for _ in range(150):
        routing = gate(x_TH, batch)
        term = routing.losses["relu_l1"]
        # Something that wants weights: without it nothing would hold against the L1.
        loss = term.sum / term.count - 0.05 * routing.weights_TE.sum(1).clamp(max=1.0).mean()
        (gradient,) = torch.autograd.grad(loss, [gate.gate.weight])
        with torch.no_grad():
            gate.gate.weight -= 0.5 * gradient
        gate.after_step(routing.sums)
        mean_k.append(float(routing.sums["load"].sum() / routing.sums["tokens"]))
    assert mean_k[0] > 6 and abs(sum(mean_k[-50:]) / 50 - 2) < 0.5


def test_the_coefficient_stays_float32_and_starts_by_the_option():
    gate = ReLUGate(6, 8, ReLUOptions(initial_coefficient=3e-5)).bfloat16()
    assert gate.coefficient.dtype == torch.float32
    assert torch.equal(gate.initial("coefficient", (1,), torch.Generator()), gate.coefficient)
    assert "coefficient" in gate.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean_k": 0.0}, "mean_k is 0.0"),
        ({"mean_k": 9.0}, "only 8 experts"),
        ({"initial_coefficient": 0.0}, "initial_coefficient is 0.0"),
        ({"multiplier": 0.9}, "multiplier is 0.9"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        ReLUGate(6, 8, ReLUOptions(**options))
