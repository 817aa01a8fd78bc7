from __future__ import annotations

import math

import pytest
import torch

from moe_train.routing import NoisyTopKGate, NoisyTopKOptions
from moe_train.routing.schedule import Ramp


def phi(z):
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def dot(x, row):
    return sum(a * b for a, b in zip(x, row, strict=True))


def transcription(x, weight, noise_weight, noise, k):
    """One token, in Python floats: weights (eq. 3 to 5) and P(x, e) (eq. 8 and 9)."""
    experts = range(len(weight))
    clean = [dot(x, row) for row in weight]
    scale = [math.log1p(math.exp(dot(x, row))) for row in noise_weight]
    noisy = [clean[e] + noise[e] * scale[e] for e in experts]
    chosen = sorted(experts, key=lambda e: (-noisy[e], e))[:k]
    total = sum(math.exp(noisy[e]) for e in chosen)
    weights = [math.exp(noisy[e]) / total if e in chosen else 0.0 for e in experts]
    probability = []
    for e in experts:
        kth_excluding = sorted((noisy[i] for i in experts if i != e), reverse=True)[k - 1]
        probability.append(phi((clean[e] - kth_excluding) / scale[e]))
    return weights, probability


def cv_squared(values):
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


def gate_of(hidden=6, experts=8, **options):
    gate = NoisyTopKGate(hidden, experts, NoisyTopKOptions(**options)).double()
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return gate


def noise_of(batch, experts=8):
    return batch.noise("noisy_topk", 0, (experts,)).tolist()


@pytest.mark.usefixtures("fresh_seed")
@pytest.mark.parametrize("k", [2, 3, 7])
def test_weights_and_losses_equal_the_formulas(k, make_batch):
    batch = make_batch([5, 3], 5, step=2)
    gate = gate_of(top_k=k)
    x_TH = torch.randn(10, 6, dtype=torch.float64)
    routing = gate(x_TH, batch)
    importance, load = [[[0.0] * 8 for _ in range(2)] for _ in range(2)]
    for t, noise in enumerate(noise_of(batch)):
        weights, probability = transcription(
            x_TH[t].tolist(), gate.weight.tolist(), gate.noise_weight.tolist(), noise, k
        )
        if bool(batch.padding_T[t]):
            weights = probability = [0.0] * 8
        torch.testing.assert_close(routing.weights_TE[t].tolist(), weights, rtol=1e-10, atol=1e-12)
        for e in range(8):
            importance[t % 2][e] += weights[e]
            load[t % 2][e] += probability[e]
    for name, sums in (("noisy_topk_importance", importance), ("noisy_topk_load", load)):
        term = routing.losses[name]
        assert int(term.count) == 2 and term.unit == "sequence"
        torch.testing.assert_close(float(term.sum), sum(map(cv_squared, sums)), rtol=1e-9, atol=0)


def test_the_smooth_load_is_the_chance_of_being_selected_again(make_batch):
    """P(x, e) by drawing e's noise many times over, everything else fixed (the sentence before eq. 8)."""
    torch.manual_seed(1)
    batch, k, draws = make_batch([1], 1), 2, 40000
    gate = gate_of(top_k=k)
    x_1H = torch.randn(1, 6, dtype=torch.float64)
    clean, scale = gate.weight @ x_1H[0], torch.nn.functional.softplus(gate.noise_weight @ x_1H[0])
    noise = torch.tensor(noise_of(batch)[0])
    _, probability = transcription(
        x_1H[0].tolist(), gate.weight.tolist(), gate.noise_weight.tolist(), noise.tolist(), k
    )
    for e in range(8):
        noisy_NE = (clean + noise * scale).repeat(draws, 1)
        noisy_NE[:, e] = clean[e] + scale[e] * torch.randn(draws, dtype=torch.float64)
        often = float((noisy_NE.topk(k, dim=1).indices == e).any(1).double().mean())
        assert abs(often - probability[e]) < 0.012


def test_no_noise_and_no_load_loss_in_evaluation(make_batch):
    batch = make_batch([6], 6)
    gate = gate_of().eval()
    x_TH = torch.randn(6, 6, dtype=torch.float64)
    routing = gate(x_TH, batch)
    want = torch.sort(x_TH @ gate.weight.T, dim=1, descending=True).indices[:, :2]
    assert torch.equal(routing.experts_TK, want)
    assert set(routing.losses) == {"noisy_topk_importance"}
    with torch.no_grad():
        gate.weight.zero_()
    assert gate(x_TH, batch).experts_TK.tolist() == [[0, 1]] * 6


def test_it_starts_as_pure_noise(make_batch):
    """Appendix A: both matrices zero, so that the load is even at the start and a gradient breaks the tie."""
    tokens = 4000
    gate = NoisyTopKGate(6, 8)
    routing = gate(torch.randn(tokens, 6), make_batch([tokens], tokens))
    share = routing.selected_TE.sum(0) / (2 * tokens)
    assert float((share - 1 / 8).abs().max()) < 0.02
    loss = (routing.weights_TE * torch.randn(tokens, 8)).sum() + sum(t.sum for t in routing.losses.values())
    loss.backward()
    assert bool(gate.weight.grad.any() and gate.noise_weight.grad.any())
    assert all(not gate.initial(name, (8, 6), torch.Generator()).any() for name in ("weight", "noise_weight"))


def test_vanishing_noise_is_finite(make_batch):
    gate = gate_of().float()
    x_TH = torch.full((4, 6), 100.0)
    with torch.no_grad():
        gate.noise_weight.fill_(-1.0)  # softplus underflows to 0
    loss = sum(term.sum for term in gate(x_TH, make_batch([4], 4)).losses.values())
    assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(loss, list(gate.parameters())))


def test_coefficients_may_be_scheduled(make_batch):
    gate = gate_of(load=Ramp(0.0, 0.4, 4))
    for step, want in ((0, 0.0), (2, 0.2), (9, 0.4)):
        routing = gate(torch.randn(4, 6, dtype=torch.float64), make_batch([4], 4, step=step))
        assert routing.losses["noisy_topk_load"].coefficient == pytest.approx(want)
    assert not gate_of(importance=0.0, load=0.0)(torch.randn(4, 6).double(), make_batch([4], 4)).losses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 1}, "no gradient"),
        ({"importance": -1.0}, "importance is -1.0"),
        ({"load": Ramp(0.1, -0.1)}, "must not be negative"),
        ({"top_k": 9}, "only 8 experts"),
        ({"top_k": 8}, "no load to balance"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        NoisyTopKGate(6, 8, NoisyTopKOptions(**options))
    NoisyTopKGate(6, 8, NoisyTopKOptions(top_k=8, load=0.0))
