"""Diversity of latents and prototypes: the cheap forms against loops over all pairs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from moe_train.routing import LatentPrototypeGate, LatentPrototypeOptions
from moe_train.routing.gates.lpr_diversity import frame_potential, mean_cosine, mean_distance

pytestmark = pytest.mark.usefixtures("fresh_seed")

LENGTHS, SEQUENCE = [6, 1, 5, 0], 6
KINDS = ["orthogonal", "cosine", "euclidean"]


def slow(kind, rows):
    """From all pairs of the rows (lists of numbers)."""
    count = len(rows)
    if count < 2 and kind != "orthogonal":
        return 0.0
    total = 0.0
    for i, x in enumerate(rows):
        for j, y in enumerate(rows):
            dot = sum(a * b for a, b in zip(x, y, strict=True))
            cosine = dot / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
            if kind == "orthogonal":
                total += (cosine - (i == j)) ** 2 / count**2
            elif i != j and kind == "cosine":
                total += cosine / (count * (count - 1))
            elif i != j:
                total -= math.dist(x, y) / (count * (count - 1))
    return total


def make_gate(**options):
    options = {"kl_weight": 0.0, "align_weight": 0.0, "latent_dim": 4} | options
    gate = LatentPrototypeGate(12, 8, LatentPrototypeOptions(**options)).double()
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return gate


def latents(gate, x_TH):
    return gate.encoder(F.silu(gate.norm(x_TH)))[:, :4]


SCOPES = [(kind, scope) for kind in KINDS for scope in ("sequence", "micro_batch", "global_batch")]


@pytest.mark.parametrize(("kind", "scope"), [c for c in SCOPES if c != ("euclidean", "global_batch")])
def test_losses_equal_loops_over_pairs(kind, scope, make_batch):
    """Row 5: padding excluded; a sequence of one token counts, one of none does not."""
    batch, gate = make_batch(LENGTHS, SEQUENCE), make_gate(diversity=kind, scope=scope)
    x_TH = torch.randn(24, 12).double()
    routing = gate(x_TH, batch)
    real_T = ~batch.padding_T
    sets = [real_T & (batch.sample_T == b) for b in range(3)] if scope == "sequence" else [real_T]
    mu_TD = latents(gate, x_TH).detach()
    found = {name: float(term.sum.detach() / term.count) for name, term in routing.losses.items()}
    of_tokens = sum(slow(kind, mu_TD[s].tolist()) for s in sets) / len(sets)
    expected = {"lpr_diversity": of_tokens, "lpr_prototype_diversity": slow(kind, gate.prototypes.tolist())}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)  # distances are sqrt(d^2 + 1e-6)


@pytest.mark.parametrize(("kind", "scope"), [c for c in SCOPES if c != ("euclidean", "global_batch")])
def test_gradients_equal_those_of_the_dense_form(kind, scope, make_batch):
    batch, gate = make_batch([6], 6), make_gate(diversity=kind, scope=scope)
    x_TH = torch.randn(6, 12).double()

    def dense(x_ND):
        off_NN = 1 - torch.eye(len(x_ND), dtype=torch.float64)
        if kind == "euclidean":
            squares_NN = (x_ND[:, None] - x_ND).square().sum(-1)
            return -((squares_NN + 1e-6).sqrt() * off_NN).sum() / off_NN.sum()
        cosines_NN = F.cosine_similarity(x_ND[:, None], x_ND, dim=-1)
        if kind == "cosine":
            return (cosines_NN * off_NN).sum() / off_NN.sum()
        return (cosines_NN * off_NN).square().mean()

    loss = sum(term.sum / term.count for term in gate(x_TH, batch).losses.values())
    expected = dense(latents(gate, x_TH)) + dense(gate.prototypes)
    wanted = [gate.encoder.weight, gate.prototypes]
    for a, b in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_frame_potential_and_the_welch_bound():
    unit_ND = F.normalize(torch.randn(40, 5).double(), dim=1)
    short = float(frame_potential((unit_ND.T @ unit_ND)[None], torch.tensor([40])))
    assert short == pytest.approx(slow("orthogonal", unit_ND.tolist()), rel=1e-6)
    assert short >= 1 / 5 - 1 / 40
    tight_ND = torch.cat([torch.eye(5), -torch.eye(5)]).double()  # a tight frame reaches the bound
    assert float(frame_potential((tight_ND.T @ tight_ND)[None], torch.tensor([10]))) == pytest.approx(1 / 5 - 1 / 10)


def test_bounds_of_the_mean_cosine():
    assert float(mean_cosine(torch.zeros(1, 3), torch.tensor([4]))) == pytest.approx(-1 / 3)
    assert float(mean_cosine(torch.tensor([[4.0, 0, 0]]), torch.tensor([4]))) == pytest.approx(1)
    assert mean_cosine(torch.rand(2, 3), torch.tensor([0, 1])).tolist() == [0, 0]


def test_distances_in_chunks(monkeypatch):
    """Memory is that of a chunk; values and gradients are the same."""
    valid_MG, results = torch.rand(13, 3) > 0.3, []
    start = torch.randn(13, 3, 4).double()
    for elements in (2**22, 100, 1):
        monkeypatch.setattr("moe_train.routing.chunks._ELEMENTS", elements)
        x_MGD = start.clone().requires_grad_()
        value_G = mean_distance(x_MGD, valid_MG)
        results.append((value_G.detach(), *torch.autograd.grad(value_G.sum(), x_MGD)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_equal_tokens_have_a_finite_gradient():
    x_MGD = torch.ones(6, 1, 4, requires_grad=True)
    value_G = mean_distance(x_MGD, torch.ones(6, 1, dtype=torch.bool))
    assert float(value_G) < 1e-2 and torch.isfinite(torch.autograd.grad(value_G.sum(), x_MGD)[0]).all()


def test_pairs_of_all_ranks_are_refused():
    with pytest.raises(ValueError, match="euclidean needs every pair of tokens"):
        LatentPrototypeOptions(diversity="euclidean", scope="global_batch")
