"""Latent prototypes that no gradient moves, and the published mode."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from moe_train.routing import LatentPrototypeGate, LatentPrototypeOptions, build_gate
from moe_train.routing.schedule import Ramp

pytestmark = pytest.mark.usefixtures("fresh_seed")

LENGTHS, SEQUENCE = [6, 4, 5], 6


def make_gate(**options):
    gate = LatentPrototypeGate(12, 8, LatentPrototypeOptions(top_k=3, latent_dim=4, **options)).double()
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return gate


def encoded(gate, x_TH):
    return [v.detach() for v in gate.encoder(F.silu(gate.norm(x_TH))).split(4, dim=1)]


def slow_published_shares(logits_TE, selected_TE):
    """Softmax over all experts of a matrix with the selected scores and zeros elsewhere."""
    shares_TE = torch.zeros_like(logits_TE)
    for t, (row, chosen) in enumerate(zip(logits_TE.tolist(), selected_TE.tolist(), strict=True)):
        powers = [math.exp(s) if c else 1.0 for s, c in zip(row, chosen, strict=True)]
        shares_TE[t] = torch.tensor(powers, dtype=torch.float64) / sum(powers)
    return shares_TE


@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
def test_published_alignment(scope, make_batch):
    """The target is a sum over tokens of noisy latents, and every expert takes part; padding is left out here."""
    batch, gate = (
        make_batch(LENGTHS, SEQUENCE, seed=4, step=9),
        make_gate(mode="published", scope=scope, reg_scale=27.0),
    )
    x_TH = torch.randn(18, 12).double()
    routing = gate(x_TH, batch)
    mu_TD, logvar_TD = encoded(gate, x_TH)
    z_TD = mu_TD + torch.exp(logvar_TD / 2) * batch.noise("lpr", 0, (4,))
    shares_TE = slow_published_shares(routing.logits_TE.detach(), routing.selected_TE)
    real_T = ~batch.padding_T
    sets = [real_T & (batch.sample_T == b) for b in range(3)] if scope == "sequence" else [real_T]
    expected = 0.0
    for inside_T in sets:
        target_ED = sum(torch.outer(shares_TE[t], z_TD[t]) for t in inside_T.nonzero().flatten().tolist())
        expected += float((gate.prototypes.detach() - target_ED).abs().mean()) / len(sets)
    term = routing.losses["lpr_alignment"]
    assert float(term.sum.detach() / term.count) == pytest.approx(expected, rel=1e-9)
    assert {name: t.coefficient for name, t in routing.losses.items()} == pytest.approx(
        {"lpr_diversity": 0.27, "lpr_prototype_diversity": 0.27, "lpr_kl": 2.7e-3, "lpr_alignment": 1.35e-2}
    ), "the effective weights of the published Mixtral runs"


def test_published_shares_are_almost_even(make_batch):
    """What the rule does with cosines, 8 of 128: nine tenths of the mass lie with experts that were not selected."""
    gate = build_gate("lpr", {"top_k": 8, "mode": "published"}, 64, 128)
    routing = gate(torch.randn(50, 64), make_batch([50], 50))
    shares_TE = slow_published_shares(routing.logits_TE.detach().double(), routing.selected_TE)
    assert 0.06 < float(shares_TE[routing.selected_TE].sum() / 50) < 0.15


@pytest.mark.parametrize("similarity", ["cosine", "kl"])
def test_noise_reaches_no_score_and_nothing_but_the_target(similarity, make_batch):
    """Two steps draw other noise: the routing and every other loss stay the same."""
    gate, x_TH = make_gate(mode="published", similarity=similarity), torch.randn(18, 12).double()
    one, two = (gate(x_TH, make_batch(LENGTHS, SEQUENCE, step=step)) for step in (1, 2))
    for name in ("logits_TE", "weights_TE", "selected_TE", "expert_input_shift_TH"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    changed = {name for name in one.losses if not torch.equal(one.losses[name].sum, two.losses[name].sum)}
    assert changed == {"lpr_alignment"}
    paper = make_gate(similarity=similarity)
    first, second = (paper(x_TH, make_batch(LENGTHS, SEQUENCE, step=step)) for step in (1, 2))
    assert all(torch.equal(first.losses[name].sum, second.losses[name].sum) for name in first.losses)


def slow_ema(gate, mass_E, batches, decay, published=False):
    """Prototypes, masses and variances after a step with these (x, batch), by loops over tokens and experts."""
    experts, latent = gate.prototypes.shape
    step_E, sums_ED = torch.zeros(experts).double(), torch.zeros(experts, latent).double()
    squares_ED = sums_ED.clone()
    for x_TH, batch in batches:
        routing = gate(x_TH, batch)
        mu_TD, logvar_TD = encoded(gate, x_TH)
        shares_TE, z_TD = routing.weights_TE.detach(), mu_TD
        if published:
            shares_TE = slow_published_shares(routing.logits_TE.detach(), routing.selected_TE)
            z_TD = mu_TD + torch.exp(logvar_TD / 2) * batch.noise("lpr", 0, (latent,))
        for t in (~batch.padding_T).nonzero().flatten().tolist():
            for e in range(experts):
                step_E[e] += shares_TE[t, e]
                sums_ED[e] += shares_TE[t, e] * z_TD[t]
                squares_ED[e] += shares_TE[t, e] * (mu_TD[t] ** 2 + logvar_TD[t].exp())
    scale = experts / float(step_E.sum())
    old_ED = gate.prototypes.double()
    new_E = decay * mass_E + (1 - decay) * scale * step_E
    new_ED = (decay * mass_E[:, None] * old_ED + (1 - decay) * scale * sums_ED) / new_E[:, None]
    if gate.prototype_logvar is None:
        return new_ED, new_E, None
    second_ED = old_ED**2 + gate.prototype_logvar.double().exp()
    second_ED = (decay * mass_E[:, None] * second_ED + (1 - decay) * scale * squares_ED) / new_E[:, None]
    return new_ED, new_E, second_ED - new_ED**2


@pytest.mark.parametrize("options", [{}, {"mode": "published"}, {"similarity": "kl"}], ids=str)
def test_moving_average(options, make_batch):
    """Three steps; once per step, from what all micro-batches and ranks add, in float32."""
    gate, mass_E = make_gate(prototypes="ema", ema_decay=0.7, **options), torch.ones(8).double()
    for step in range(3):
        batches = [
            (torch.randn(12, 12).double(), make_batch([6, 3], SEQUENCE, samples=[s, s + 1], step=step)) for s in (0, 2)
        ]
        want_ED, mass_E, variance_ED = slow_ema(gate, mass_E, batches, 0.7, options.get("mode") == "published")
        before_ED = gate.prototypes.clone()
        sums = [gate(x, b).sums for x, b in batches]
        assert torch.equal(gate.prototypes, before_ED), "forward moved it"
        gate.after_step({name: sums[0][name] + sums[1][name] for name in sums[0]})
        torch.testing.assert_close(gate.prototypes.double(), want_ED, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gate.prototype_mass.double(), mass_E, rtol=1e-5, atol=1e-6)
        if variance_ED is not None:
            torch.testing.assert_close(gate.prototype_logvar.double().exp(), variance_ED, rtol=1e-4, atol=1e-5)
        assert gate.prototypes.dtype == gate.prototype_mass.dtype == torch.float32


@pytest.mark.parametrize("groups", [[[2, 0, 1]], [[0], [1, 2]], [[0], [2], [1]]], ids=str)
def test_moving_average_under_every_split(groups, make_batch):
    gate, x_SBH = make_gate(prototypes="ema", similarity="js"), torch.randn(SEQUENCE, 3, 12).double()
    moved = []
    for split in ([[0, 1, 2]], groups):
        other = make_gate(prototypes="ema", similarity="js")
        other.load_state_dict(gate.state_dict())
        total: dict[str, torch.Tensor] = {}
        for group in split:
            batch = make_batch([LENGTHS[b] for b in group], SEQUENCE, samples=group)
            for name, value in other(x_SBH[:, group].reshape(-1, 12), batch).sums.items():
                total[name] = total.get(name, 0) + value
        other.after_step(total)
        moved.append(other.state_dict())
    for name, value in moved[0].items():
        torch.testing.assert_close(moved[1][name], value, rtol=1e-6, atol=1e-7)


def test_experts_without_tokens_stay_where_they_are(make_batch):
    """Published code would divide by too small a count in the first step, and draw them to 0 in the end."""
    gate = make_gate(prototypes="ema", ema_decay=0.1)
    start_ED, x_TH, batch = gate.prototypes.clone(), torch.randn(18, 12).double(), make_batch(LENGTHS, SEQUENCE)
    replay_TE = torch.zeros(18, 8, dtype=torch.bool)
    replay_TE[:, :3] = ~batch.padding_T[:, None]
    sums = gate(x_TH, batch, replay_TE=replay_TE).sums
    for _ in range(60):
        gate.after_step(sums)
    assert torch.equal(gate.prototypes[3:], start_ED[3:])
    mean_ED = sums["lpr_latents"][:3] / sums["lpr_mass"][:3, None]
    torch.testing.assert_close(gate.prototypes[:3].double(), mean_ED, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("similarity", ["cosine", "kl"])
def test_a_step_without_tokens_leaves_the_moving_average_as_it_is(similarity, make_batch):
    """All padding, whatever stands there. An expert without tokens, however, loses mass where others have some."""
    gate = make_gate(prototypes="ema", ema_decay=0.7, similarity=similarity)
    gate.after_step(gate(torch.randn(18, 12).double(), make_batch(LENGTHS, SEQUENCE)).sums)
    before = {name: value.clone() for name, value in gate.named_buffers()}
    for fill in (1.0, float("nan")):
        sums = gate(torch.full((18, 12), fill).double(), make_batch([0, 0, 0], SEQUENCE)).sums
        gate.after_step(sums)
        assert before and all(torch.equal(value, before[name]) for name, value in gate.named_buffers())
    batch, replay_TE = make_batch(LENGTHS, SEQUENCE), torch.zeros(18, 8, dtype=torch.bool)
    replay_TE[:, :3] = ~batch.padding_T[:, None]
    gate.after_step(gate(torch.randn(18, 12).double(), batch, replay_TE=replay_TE).sums)
    torch.testing.assert_close(gate.prototype_mass[3:], 0.7 * before["prototype_mass"][3:])


@pytest.mark.parametrize("similarity", ["cosine", "wasserstein"])
@pytest.mark.parametrize("prototypes", ["frozen", "ema"])
def test_prototypes_that_no_gradient_moves(prototypes, similarity, make_batch):
    """They are state: saved, float32 under bfloat16, begun like learned ones, and no loss is for them alone."""
    gate, batch = make_gate(prototypes=prototypes, similarity=similarity), make_batch(LENGTHS, SEQUENCE)
    own = {"prototypes"} | ({"prototype_logvar"} if similarity == "wasserstein" else set())
    own |= {"prototype_mass"} if prototypes == "ema" else set()
    assert own <= gate.state_dict().keys() and not own & dict(gate.named_parameters()).keys()
    assert set(gate.expert_rows) == own and gate.no_decay_parameters() == set()
    routing = gate(torch.randn(18, 12).double(), batch)
    assert set(routing.losses) == {"lpr_diversity", "lpr_kl"}
    assert bool(routing.sums) == (prototypes == "ema")
    before = {name: gate.state_dict()[name].clone() for name in own}
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.1)
    (sum(t.sum for t in routing.losses.values()) + routing.weights_TE.square().sum()).backward()
    optimizer.step()
    gate.bfloat16()
    assert all(torch.equal(gate.state_dict()[name], value) for name, value in before.items())
    gate.after_step(routing.sums)
    assert torch.equal(gate.prototypes, before["prototypes"]) == (prototypes == "frozen")
    generator = lambda: torch.Generator().manual_seed(5)  # noqa: E731
    learned = make_gate(similarity=similarity)
    for name in own - {"prototype_mass"}:
        assert torch.equal(gate.initial(name, (8, 4), generator()), learned.initial(name, (8, 4), generator()))


def test_without_the_input_shift(make_batch):
    gate = make_gate(input_shift=False)
    assert gate(torch.randn(18, 12).double(), make_batch(LENGTHS, SEQUENCE)).expert_input_shift_TH is None
    assert gate.shift_parameters == () and not any(name.startswith("decoder") for name in gate.state_dict())


def test_parameters_of_their_own():
    """What begins at 0 by the formula, and what gets no weight decay."""
    gate = make_gate(similarity="mahalanobis")
    assert not gate.initial("similarity.log_sigma", (4,), torch.Generator()).any()
    assert gate.no_decay_parameters() == {"prototypes"}
    gate = make_gate(similarity="kl")
    assert not gate.initial("prototype_logvar", (8, 4), torch.Generator()).any()
    assert gate.no_decay_parameters() == set(gate.expert_rows) == {"prototypes", "prototype_logvar"}


def test_coefficients_that_change(make_batch):
    """A loss is there from the first step on if it ever counts, with the coefficient of its step."""
    ramp = {"start": 0.0, "end": 0.4, "steps": 4}
    gate = build_gate("lpr", {"coefficient": 0.1, "kl_weight": ramp, "align_weight": 0, "reg_scale": 2}, 12, 8)
    for step, expected in ((0, 0.0), (1, 0.02), (9, 0.08)):
        losses = gate(torch.randn(18, 12), make_batch(LENGTHS, SEQUENCE, step=step)).losses
        assert set(losses) == {"lpr_diversity", "lpr_prototype_diversity", "lpr_kl"}
        assert losses["lpr_kl"].coefficient == pytest.approx(expected)
        assert losses["lpr_diversity"].coefficient == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0, "similarity": "gaussian"}, "sigma is 0.0"),
        ({"sigma": 2.0}, "sigma is for similarity gaussian"),
        ({"ema_decay": 1.0, "prototypes": "ema"}, "ema_decay is 1.0"),
        ({"ema_decay": 0.5}, "ema_decay is for prototypes ema, not for learned"),
        ({"align_weight": 0.5, "prototypes": "frozen"}, "align_weight is for prototypes learned.* not for frozen"),
        ({"align_weight": Ramp(end=0.1), "prototypes": "ema"}, "align_weight is for prototypes learned.* not for ema"),
        ({"mode": "published", "prototypes": "frozen"}, "mode published is for prototypes that move, not for frozen"),
        ({"reg_scale": -1.0}, "reg_scale"),
        ({"align_weight": Ramp(start=1.0, end=-1.0)}, "align_weight"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        LatentPrototypeOptions(**options)
