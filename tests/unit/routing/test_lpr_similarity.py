"""Scores of latent prototype routing against their formulas, pair by pair in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from moe_train.routing import build_gate
from moe_train.routing.gates.lpr_distances import GAUSSIAN_DISTANCES, gaussian_distances
from moe_train.routing.gates.lpr_similarity import Gaussians, build_similarity, unit_rows

pytestmark = pytest.mark.usefixtures("fresh_seed")

DIMENSIONS = 5
KINDS = ["cosine", "dot", "gaussian", "mahalanobis", "cross_attention", "kl", "js", "hellinger", "wasserstein"]


def normed(x):
    size = math.sqrt(sum(v * v for v in x) / len(x) + 1e-6)
    return [v / size for v in x]


def affine(linear, x):
    rows = zip(linear.weight, linear.bias, strict=True)
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in rows]


def slow_kl(m1, v1, m2, v2):
    return sum(0.5 * (math.log(b / a) + (a + (m - n) ** 2) / b - 1) for m, a, n, b in zip(m1, v1, m2, v2, strict=True))


def slow_score(kind, module, m, v, p, w):
    """``m, v`` mean and variances of a token, ``p, w`` of a prototype."""
    pairs = list(zip(m, v, p, w, strict=True))
    dot = sum(a * b for a, b in zip(m, p, strict=True))
    if kind == "cosine":
        return dot / math.sqrt(sum(a * a for a in m) * sum(b * b for b in p))
    if kind == "dot":
        return dot
    if kind == "gaussian":
        return math.exp(-sum((a - b) ** 2 for a, b in zip(m, p, strict=True)) / (2 * 1.7**2))
    if kind == "mahalanobis":
        sigmas = module.log_sigma.tolist()
        return 1 / (1 + sum((m - p) ** 2 / math.exp(s) for (m, _, p, _), s in zip(pairs, sigmas, strict=True)))
    if kind == "cross_attention":
        query = [a * g for a, g in zip(normed(affine(module.query, m)), module.query_norm.weight, strict=True)]
        key = [a * g for a, g in zip(normed(affine(module.key, p)), module.key_norm.weight, strict=True)]
        return sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(DIMENSIONS)
    if kind == "kl":
        return -slow_kl(m, v, p, w)
    if kind == "js":
        middle = [(a + b) / 2 for a, b in zip(m, p, strict=True)], [(a + b) / 2 for a, b in zip(v, w, strict=True)]
        return -0.5 * slow_kl(m, v, *middle) - 0.5 * slow_kl(p, w, *middle)
    if kind == "hellinger":
        product = 1.0
        for m, v, p, w in pairs:
            product *= math.sqrt(2 * math.sqrt(v * w) / (v + w)) * math.exp(-((m - p) ** 2) / (4 * (v + w)))
        return -math.sqrt(1 - product)
    return -math.sqrt(sum((m - p) ** 2 + (math.sqrt(v) - math.sqrt(w)) ** 2 for m, v, p, w in pairs) + 1e-6)


def random_pair(tokens=6, experts=4, dtype=torch.float64):
    draw = lambda n: torch.randn(n, DIMENSIONS, dtype=dtype)  # noqa: E731
    return Gaussians(draw(tokens), draw(tokens)), Gaussians(draw(experts), draw(experts))


def similarity(kind, dtype=torch.float64):
    module = build_similarity(kind, DIMENSIONS, 1.7).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_the_formula(kind):
    module, (latents, prototypes) = similarity(kind), random_pair()
    scores_TE = module(latents, prototypes)
    assert scores_TE.shape == (6, 4)
    with torch.no_grad():
        for t in range(6):
            for e in range(4):
                of = [
                    (g.mean_ND[i].tolist(), g.logvar_ND[i].exp().tolist()) for g, i in ((latents, t), (prototypes, e))
                ]
                expected = float(slow_score(kind, module, *of[0], *of[1]))
                assert float(scores_TE[t, e]) == pytest.approx(expected, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_differences(kind):
    module, (latents, prototypes) = similarity(kind), random_pair(3, 2)
    inputs = [latents.mean_ND, latents.logvar_ND, prototypes.mean_ND, prototypes.logvar_ND]

    def scores(*values):
        return module(Gaussians(*values[:2]), Gaussians(*values[2:]))

    assert torch.autograd.gradcheck(scores, [x.requires_grad_() for x in inputs])


def test_kl_is_that_of_torch():
    latents, prototypes = random_pair()
    q = Normal(latents.mean_ND[:, None], torch.exp(0.5 * latents.logvar_ND)[:, None])
    p = Normal(prototypes.mean_ND, torch.exp(0.5 * prototypes.logvar_ND))
    torch.testing.assert_close(-similarity("kl")(latents, prototypes), kl_divergence(q, p).sum(-1))


@pytest.mark.parametrize("kind", sorted(GAUSSIAN_DISTANCES))
def test_a_distribution_is_nearest_to_itself(kind):
    """Distance about 0 with a finite gradient; nothing below; hellinger at most 1."""
    latents, _ = random_pair(8)
    values = [x.float().requires_grad_() for x in (latents.mean_ND, latents.logvar_ND)]
    distances_NN = gaussian_distances(kind, *values, *values)
    assert bool((distances_NN.diagonal() < 1e-2).all()) and bool((distances_NN >= -1e-5).all())
    assert torch.equal(distances_NN.argmin(1), torch.arange(8))
    assert kind != "hellinger" or bool((distances_NN <= 1 + 1e-6).all())
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(distances_NN.sum(), values))


@pytest.mark.parametrize("kind", sorted(GAUSSIAN_DISTANCES))
def test_distances_far_apart_and_of_many_dimensions_stay_finite(kind):
    """Where 64 factors below 1e-6 each would be 0."""
    mean_TD, logvar_TD = (50 * torch.randn(3, 64)).requires_grad_(), (4 * torch.randn(3, 64)).requires_grad_()
    distances_TE = gaussian_distances(kind, mean_TD, logvar_TD, torch.randn(2, 64), torch.full((2, 64), -30.0))
    assert torch.isfinite(distances_TE).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(distances_TE.sum(), [mean_TD, logvar_TD]))


@pytest.mark.parametrize("kind", ["kl", "js", "hellinger"])
def test_small_variances_keep_their_digits(kind):
    """float32 as near to float64 as rounding the inputs allows, means far from 0."""
    mean_TD, mean_ED = 3 + 1e-3 * torch.randn(20, 8), 3 + 1e-3 * torch.randn(5, 8)
    logvars = [math.log(1e-5) + 0.3 * torch.randn(n, 8) for n in (20, 5)]
    fast = gaussian_distances(kind, mean_TD, logvars[0], mean_ED, logvars[1])
    exact = gaussian_distances(kind, *(x.double() for x in (mean_TD, logvars[0], mean_ED, logvars[1])))
    torch.testing.assert_close(fast.double(), exact, rtol=1e-3, atol=1e-4)


def test_js_and_hellinger_rank_experts_alike(make_batch):
    """With a Gaussian in place of the mixture, js is the Bhattacharyya distance."""
    batch, x_TH = make_batch([40], 40), torch.randn(40, 12).double()
    selected = []
    for kind in ("js", "hellinger"):
        torch.manual_seed(3)
        gate = build_gate("lpr", {"similarity": kind, "latent_dim": 4, "top_k": 3}, 12, 8).double()
        for parameter in gate.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        selected.append(gate(x_TH, batch).selected_TE)
    assert torch.equal(*selected)


@pytest.mark.parametrize("kind", ["kl", "js", "wasserstein"])
def test_chunks_change_nothing(kind, monkeypatch):
    """Values bitwise, gradients to rounding; with chunks of one row and of some."""
    latents, prototypes = random_pair(11)
    results = []
    for elements in (2**22, 47, 1):
        monkeypatch.setattr("moe_train.routing.chunks._ELEMENTS", elements)
        inputs = [x.detach().clone().requires_grad_() for g in (latents, prototypes) for x in (g.mean_ND, g.logvar_ND)]
        distances_TE = gaussian_distances(kind, *inputs)
        results.append([distances_TE, *torch.autograd.grad(distances_TE.square().sum(), inputs)])
        with torch.no_grad():
            torch.testing.assert_close(gaussian_distances(kind, *inputs), distances_TE, rtol=1e-12, atol=1e-12)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_rows_of_zeros_have_a_finite_gradient():
    x = torch.zeros(2, 3, requires_grad=True)
    unit_rows(x).sum().backward()
    assert torch.isfinite(x.grad).all()
