from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from moe_train.routing import ExpertChoiceGate, ExpertChoiceOptions

LENGTHS, SEQUENCE = [7, 4, 0, 6], 7


def transcription(x_TH, weight_EH, batch, pool, factor, training):
    """The paper's eq. 1 and 2 token by token; the gate's own rule for evaluation."""
    tokens, experts = range(len(x_TH)), len(weight_EH)
    p = []
    for t in tokens:
        logits = [sum(float(x * w) for x, w in zip(x_TH[t], row, strict=True)) for row in weight_EH]
        total = sum(math.exp(v) for v in logits)
        p.append([math.exp(v) / total for v in logits])
    chosen = set()
    if training:
        groups = [[t for t in tokens if t % batch.batch_size == b] for b in range(batch.batch_size)]
        for group in groups if pool == "sequence" else [list(tokens)]:
            real = [t for t in group if not batch.padding_T[t]]
            capacity = math.ceil(Fraction(factor) * len(real) / experts)
            for e in range(experts):
                chosen |= {(t, e) for t in sorted(real, key=lambda t: (-p[t][e], t))[:capacity]}
    else:
        k = max(1, int(factor + 0.5))  # halves up
        for t in tokens:
            if not batch.padding_T[t]:
                chosen |= {(t, e) for e in sorted(range(experts), key=lambda e: (-p[t][e], e))[:k]}
    return [[p[t][e] if (t, e) in chosen else 0.0 for e in range(experts)] for t in tokens]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", ["sequence", "micro_batch"])
@pytest.mark.parametrize("factor", [0.25, 1.0, 2.0, 2.5, 2.75])
def test_transcription(training, pool, factor, make_batch, fresh_seed):
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = ExpertChoiceGate(6, 5, ExpertChoiceOptions(factor, pool)).double().train(training)
    torch.nn.init.normal_(gate.weight)
    x_TH = torch.randn(28, 6, dtype=torch.float64)
    weights_TE = gate(x_TH, batch).weights_TE
    want = transcription(x_TH, gate.weight.detach(), batch, pool, factor, training)
    torch.testing.assert_close(weights_TE.tolist(), want, rtol=1e-9, atol=1e-13)


def test_the_load_is_even_also_where_all_tokens_want_one_expert(make_batch):
    batch = make_batch([16, 16], 16)
    gate = ExpertChoiceGate(4, 8, ExpertChoiceOptions(2.0))
    torch.nn.init.zeros_(gate.weight)
    with torch.no_grad():
        gate.weight[3] = 5.0
    x_TH = torch.rand(32, 4)
    assert gate(x_TH, batch).selected_TE.sum(0).tolist() == [8] * 8
    assert gate.eval()(x_TH, batch).selected_TE.sum(0)[3] == 32


def test_no_capacity_is_lost_or_won_by_rounding(make_batch):
    """0.7 * 10 / 7 is 1 by fractions and 0.9999999999999999 or more than 1 by floating point, as it comes."""
    for tokens, factor, experts, capacity in [(10, 0.7, 7, 1), (30, 1.4, 7, 6), (100, 1.1, 11, 10), (3, 1.0, 2, 2)]:
        gate = ExpertChoiceGate(4, experts, ExpertChoiceOptions(factor))
        routing = gate(torch.randn(tokens, 4), make_batch([tokens], tokens))
        assert routing.selected_TE.sum(0).tolist() == [capacity] * experts


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_options(factor):
    with pytest.raises(ValueError, match="capacity_factor"):
        ExpertChoiceOptions(factor)


def test_more_experts_per_token_than_there_are():
    with pytest.raises(ValueError, match="no more than 2"):
        ExpertChoiceGate(4, 2, ExpertChoiceOptions(2.5))
