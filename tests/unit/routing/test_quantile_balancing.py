from __future__ import annotations

import math

import pytest
import torch

from moe_train.routing import QuantileBalancingGate, QuantileBalancingOptions

LENGTHS, SEQUENCE = [7, 4, 0, 6], 7


def logits_of(x_TH, weight_EH):
    return [[sum(float(a * b) for a, b in zip(x, row, strict=True)) for row in weight_EH] for x in x_TH]


def quantiles(logits, beta, pools, k):
    """Per pool and expert: the (floor(n k / E) + 1)-th largest l - alpha, alpha a token's (k+1)-th largest l - beta."""
    experts = len(beta)
    found = []
    for real in pools:
        alpha = {t: sorted((logits[t][e] - beta[e] for e in range(experts)), reverse=True)[k] for t in real}
        place = len(real) * k // experts
        found.append([sorted((logits[t][e] - alpha[t] for t in real), reverse=True)[place] for e in range(experts)])
    return found


@pytest.mark.parametrize("weights", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("k", "ema", "scope"), [(1, 0.0, "sequence"), (2, 0.3, "micro_batch"), (3, 0.9, "sequence")])
def test_transcription(weights, k, ema, scope, make_batch, fresh_seed):
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = QuantileBalancingGate(6, 5, QuantileBalancingOptions(k, weights, ema, scope)).double()
    torch.nn.init.normal_(gate.weight)
    gate.beta.copy_(torch.randn(5))
    beta = gate.beta.tolist()
    x_TH = torch.randn(28, 6, dtype=torch.float64)
    logits = logits_of(x_TH, gate.weight.detach())
    routing = gate(x_TH, batch)
    for t, row in enumerate(logits):
        s = [
            math.exp(v) / sum(math.exp(u) for u in row) if weights == "softmax" else 1 / (1 + math.exp(-v)) for v in row
        ]
        chosen = sorted(range(5), key=lambda e: beta[e] - row[e])[:k] if not batch.padding_T[t] else []
        divisor = sum(s[e] for e in chosen) if k > 1 else 1.0
        want = [s[e] / divisor if e in chosen else 0.0 for e in range(5)]
        torch.testing.assert_close(routing.weights_TE[t].tolist(), want, rtol=1e-9, atol=1e-13)
    real = [t for t in range(28) if not batch.padding_T[t]]
    sequences = [[t for t in real if t % 4 == b] for b in (0, 1, 3)]
    found = quantiles(logits, beta, sequences if scope == "sequence" else [real], k)
    gate.after_step(routing.sums)
    moved = [ema * beta[e] + (1 - ema) * sum(row[e] for row in found) / len(found) for e in range(5)]
    centred = [v - sum(moved) / 5 for v in moved]
    torch.testing.assert_close(gate.beta.tolist(), centred, rtol=0, atol=1e-6)


def test_the_quantile_admits_the_share(make_batch, fresh_seed):
    """What the rule is for: against the old cutoffs, floor(n k / E) = 10 tokens lie above each expert's new threshold.
    Where it is the old one, 0, those lie at it whose third expert this is."""
    batch = make_batch([40], 40)
    gate = QuantileBalancingGate(6, 8, QuantileBalancingOptions(2)).double()
    torch.nn.init.normal_(gate.weight)
    x_TH = torch.randn(40, 6, dtype=torch.float64)
    routing = gate(x_TH, batch)
    alpha_T1 = routing.logits_TE.topk(3).values[:, 2:]
    quantile_E = routing.sums["quantile"].double() * 2.0**-24
    margin_TE = routing.logits_TE - alpha_T1
    above_E, not_below_E = (margin_TE > quantile_E + 1e-6).sum(0), (margin_TE > quantile_E - 1e-6).sum(0)
    for above, not_below, quantile in zip(above_E.tolist(), not_below_E.tolist(), quantile_E.tolist(), strict=True):
        assert above <= 10 < not_below
        assert above == 10 or quantile == 0


def test_the_load_becomes_even(make_batch, fresh_seed):
    """On the same tokens again and again; a favourite of all tokens has lost its lead after few steps."""
    batch = make_batch([64] * 4, 64)
    gate = QuantileBalancingGate(16, 8)
    torch.nn.init.normal_(gate.weight, std=0.25)
    x_TH = torch.randn(256, 16)
    x_TH[:, 0] = 1.0
    with torch.no_grad():
        gate.weight[3, 0] += 3.0
    loads = []
    for _ in range(12):
        routing = gate(x_TH, batch)
        loads.append(routing.selected_TE.sum(0))
        gate.after_step(routing.sums)
    assert int(loads[0].max()) > 200 and int(loads[-1].max()) < 100  # an even share is 64
    assert torch.equal(gate.eval()(x_TH, batch).selected_TE, gate.train()(x_TH, batch).selected_TE)


def test_sums_are_the_same_for_every_split_into_micro_batches(make_batch, fresh_seed):
    gate = QuantileBalancingGate(16, 8).double()
    x_SBH = torch.randn(SEQUENCE, 4, 16, dtype=torch.float64)
    whole = gate(x_SBH.view(-1, 16), make_batch(LENGTHS, SEQUENCE)).sums
    parts = [gate(x_SBH[:, b].contiguous(), make_batch([n], SEQUENCE)).sums for b, n in enumerate(LENGTHS)]
    for name, value in whole.items():
        assert (sum(part[name] for part in parts) - value).abs().max() <= 1  # of units of 2^-24
    before = gate.beta.clone()
    gate.after_step(parts[2])  # nothing but padding
    assert torch.equal(gate.beta, before)


def test_state_is_float32_and_saved():
    gate = QuantileBalancingGate(4, 8).bfloat16()
    assert gate.beta.dtype == torch.float32 and "beta" in gate.state_dict()


@pytest.mark.parametrize("options", [{"top_k": 0}, {"ema": 1.0}, {"ema": -0.1}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="top_k|ema"):
        QuantileBalancingOptions(**options)


def test_a_threshold_needs_an_expert_that_is_not_chosen():
    with pytest.raises(ValueError, match="an expert more"):
        QuantileBalancingGate(4, 3, QuantileBalancingOptions(3))
