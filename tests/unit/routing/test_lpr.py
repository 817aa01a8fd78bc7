from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from moe_train.routing import LatentPrototypeGate, LatentPrototypeOptions

LENGTHS, SEQUENCE = [6, 4, 5], 6


def make_gate(**options):
    torch.manual_seed(0)
    gate = LatentPrototypeGate(12, 8, LatentPrototypeOptions(top_k=3, latent_dim=4, **options)).double()
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return gate


def latents(gate, x_TH):
    a_TH = F.silu(gate.norm(x_TH))
    return gate.encoder(a_TH).split(4, dim=1)


def dense_diversity(x_ND):
    """mean over all pairs of (cosine - identity)^2, by loops."""
    count, total = len(x_ND), 0.0
    for i in range(count):
        for j in range(count):
            cosine = float(x_ND[i] @ x_ND[j] / (x_ND[i].norm() * x_ND[j].norm()))
            total += (cosine - (i == j)) ** 2
    return total / count**2


def slow_alignment(prototypes_ED, mu_TD, weights_TE):
    total = 0.0
    for e in range(prototypes_ED.shape[0]):
        mass = float(weights_TE[:, e].sum())
        if mass == 0:
            continue
        for d in range(prototypes_ED.shape[1]):
            target = sum(float(weights_TE[t, e] * mu_TD[t, d]) for t in range(len(mu_TD))) / mass
            total += abs(float(prototypes_ED[e, d]) - target)
    return total / prototypes_ED.numel()


def test_routing_equals_the_formula(make_batch):
    batch, gate = make_batch(LENGTHS, SEQUENCE), make_gate()
    x_TH = torch.randn(18, 12, dtype=torch.float64)
    routing = gate(x_TH, batch)
    mu_TD = latents(gate, x_TH)[0].detach()
    for t in range(18):
        scores = [float(F.cosine_similarity(mu_TD[t], p, dim=0)) for p in gate.prototypes.detach()]
        torch.testing.assert_close(routing.logits_TE[t].tolist(), scores, rtol=1e-9, atol=1e-9)
        chosen = sorted(range(8), key=lambda e: -scores[e])[:3] if not bool(batch.padding_T[t]) else []
        weights = [math.exp(s) * (e in chosen) for e, s in enumerate(scores)]
        expected = [w / max(sum(weights), 1e-300) for w in weights]
        torch.testing.assert_close(routing.weights_TE[t].tolist(), expected, rtol=1e-9, atol=1e-9)
        attention = torch.tensor(scores, dtype=torch.float64).softmax(0)
        decoded = gate.decoder(attention @ gate.prototypes)
        torch.testing.assert_close(routing.expert_input_shift_TH[t], decoded, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
def test_losses_equal_slow_transcriptions(scope, make_batch):
    """Rows 5 and 7: padding excluded; what is logged is what a reader computes from the formula."""
    batch, gate = make_batch(LENGTHS, SEQUENCE), make_gate(scope=scope)
    x_TH = torch.randn(18, 12, dtype=torch.float64)
    routing = gate(x_TH, batch)
    mu_TD, logvar_TD = (v.detach() for v in latents(gate, x_TH))
    found = {name: float(term.sum.detach() / term.count) for name, term in routing.losses.items()}
    if scope == "sequence":
        sets = [(batch.sample_T == b) & ~batch.padding_T for b in range(3)]
    else:
        sets = [~batch.padding_T]
    prototypes_ED = gate.prototypes.detach()
    expected = {
        "lpr_diversity": sum(dense_diversity(mu_TD[s]) for s in sets) / len(sets),
        "lpr_prototype_diversity": dense_diversity(prototypes_ED),
        "lpr_alignment": sum(slow_alignment(prototypes_ED, mu_TD[s], routing.weights_TE.detach()[s]) for s in sets)
        / len(sets),
        "lpr_kl": sum(
            -0.5 * float(1 + v - m**2 - math.exp(v)) / int(s.sum())
            for s in sets
            for m, v in zip(mu_TD[s].flatten().tolist(), logvar_TD[s].flatten().tolist(), strict=True)
        )
        / len(sets),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9), name
    coefficients = {name: term.coefficient for name, term in routing.losses.items()}
    assert coefficients == pytest.approx(
        {"lpr_diversity": 0.01, "lpr_prototype_diversity": 0.01, "lpr_kl": 1e-4, "lpr_alignment": 5e-4}
    )


@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
def test_gradients_equal_autograd_through_the_dense_formula(scope, make_batch):
    batch, gate = make_batch([6], 6), make_gate(scope=scope)
    x_TH = torch.randn(6, 12, dtype=torch.float64)
    routing = gate(x_TH, batch)
    mu_TD, logvar_TD = latents(gate, x_TH)

    def dense(x_ND):
        unit = F.normalize(x_ND, dim=1)
        return ((unit @ unit.T - torch.eye(len(x_ND))) ** 2).mean()

    weights_TE = routing.weights_TE.detach()
    mass_E1 = weights_TE.sum(0)[:, None]
    target_ED = weights_TE.T @ mu_TD.detach() / mass_E1.clamp(min=1e-30)
    expected = 0.01 * (dense(mu_TD) + dense(gate.prototypes))
    expected = expected + 0.0001 * (-0.5 * (1 + logvar_TD - mu_TD**2 - logvar_TD.exp())).sum(1).mean()
    expected = expected + 0.0005 * ((gate.prototypes - target_ED).abs() * (mass_E1 > 0)).mean()
    loss = sum(term.coefficient * term.sum / term.count for term in routing.losses.values())
    parameters = [gate.norm.weight, gate.norm.bias, gate.encoder.weight, gate.encoder.bias, gate.prototypes]
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-13)


def test_zero_weights_leave_losses_out(make_batch):
    batch = make_batch(LENGTHS, SEQUENCE)
    routing = make_gate(kl_weight=0.0, diversity_weight=0.0)(torch.randn(18, 12).double(), batch)
    assert set(routing.losses) == {"lpr_alignment"}
    assert not make_gate(coefficient=0.0)(torch.randn(18, 12).double(), batch).losses


def test_log_variance_learns_from_the_kl_alone(make_batch):
    batch, gate = make_batch(LENGTHS, SEQUENCE), make_gate(kl_weight=0.0)
    routing = gate(torch.randn(18, 12, dtype=torch.float64), batch)
    loss = routing.weights_TE.square().sum() + routing.expert_input_shift_TH.square().sum()
    loss = loss + sum(term.sum for term in routing.losses.values())
    gradient = torch.autograd.grad(loss, gate.encoder.weight)[0]
    assert bool(gradient[:4].any()) and not bool(gradient[4:].any())


def test_prototype_placement():
    generator = torch.Generator().manual_seed(1)
    ball = LatentPrototypeGate(12, 8, LatentPrototypeOptions(prototype_init="hypersphere"))
    torch.testing.assert_close(ball.prototypes.detach().norm(dim=1), torch.ones(8))
    torch.testing.assert_close(ball.initial("prototypes", (8, 16), generator).norm(dim=1), torch.ones(8))
    free = LatentPrototypeGate(12, 8)
    assert 3.0 < float(free.initial("prototypes", (800, 16), generator).norm(dim=1).mean()) < 5.0
    assert free.initial("encoder.weight", (32, 12), generator) is None
    assert free.no_decay_parameters() == {"prototypes"}


@pytest.mark.parametrize("options", [{"top_k": 0}, {"latent_dim": 0}, {"kl_weight": -1.0}, {"coefficient": math.nan}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LatentPrototypeOptions(**options)


def test_a_gate_that_nothing_teaches_is_refused():
    with pytest.raises(ValueError, match="no way"):
        LatentPrototypeOptions(top_k=1, input_shift=False)
    LatentPrototypeOptions(top_k=1)
