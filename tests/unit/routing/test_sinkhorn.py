from __future__ import annotations

import math

import pytest
import torch

from moe_train.routing import SinkhornGate, SinkhornOptions
from moe_train.routing.gates.sinkhorn import log_column_factors

LENGTHS, SEQUENCE = [7, 4, 0, 6], 7


def normalised(exponentials, iterations):
    """Rows, then columns, of a table of positive numbers; as often as asked."""
    table = [list(row) for row in exponentials]
    for _ in range(iterations):
        table = [[v / sum(row) / len(table) for v in row] for row in table]
        columns = [sum(row[e] for row in table) for e in range(len(table[0]))]
        table = [[v / columns[e] / len(columns) for e, v in enumerate(row)] for row in table]
    return table


def transcription(x_TH, weight_EH, batch, options, training):
    tokens, experts = range(len(x_TH)), len(weight_EH)
    logits = [[sum(float(x * w) for x, w in zip(x, row, strict=True)) for row in weight_EH] for x in x_TH]
    ranked = {t: logits[t] for t in tokens if not batch.padding_T[t]}
    if training:
        groups = [[t for t in tokens if t % batch.batch_size == b] for b in range(batch.batch_size)]
        for group in groups if options.pool == "sequence" else [list(tokens)]:
            real = [t for t in group if not batch.padding_T[t]]
            if not real:
                continue
            table = [[math.exp(v / options.temperature) for v in logits[t]] for t in real]
            ranked |= dict(zip(real, normalised(table, options.iterations), strict=True))
    want = [[0.0] * experts for _ in tokens]
    for t, row in ranked.items():
        total = sum(math.exp(v) for v in logits[t])
        for e in sorted(range(experts), key=lambda e: (-row[e], e))[: options.top_k]:
            want[t][e] = 1 / (1 + math.exp(-logits[t][e])) if options.top_k == 1 else math.exp(logits[t][e]) / total
    return want


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", ["sequence", "micro_batch"])
@pytest.mark.parametrize(("k", "iterations", "temperature"), [(1, 20, 1.0), (2, 7, 0.5), (3, 1, 2.0), (2, 0, 1.0)])
def test_transcription(training, pool, k, iterations, temperature, make_batch, fresh_seed):
    batch = make_batch(LENGTHS, SEQUENCE)
    options = SinkhornOptions(k, iterations, temperature, pool)
    gate = SinkhornGate(6, 5, options).double().train(training)
    torch.nn.init.normal_(gate.weight)
    x_TH = torch.randn(28, 6, dtype=torch.float64)
    want = transcription(x_TH, gate.weight.detach(), batch, options, training)
    torch.testing.assert_close(gate(x_TH, batch).weights_TE.tolist(), want, rtol=1e-9, atol=1e-13)


def test_the_factors_give_even_columns_also_for_scores_whose_exponentials_overflow(fresh_seed):
    scores_PME = torch.randn(2, 40, 8, dtype=torch.float64) + torch.tensor([1e4, 0.0, 2, 0, 0, -3, 0, 0]).double()
    padding_PM = torch.zeros(2, 40, dtype=torch.bool)
    columns_PE = log_column_factors(scores_PME, padding_PM, 500)
    mass_PE = torch.softmax(scores_PME + columns_PE[:, None], dim=2).sum(1)
    torch.testing.assert_close(mass_PE, torch.full_like(mass_PE, 5.0), rtol=1e-3, atol=0)


def test_a_favourite_of_all_tokens_gets_its_share_in_training_and_everything_in_evaluation(make_batch, fresh_seed):
    batch = make_batch([64, 64], 64)
    gate = SinkhornGate(16, 8)
    torch.nn.init.normal_(gate.weight, std=0.3)
    x_TH = torch.randn(128, 16)
    x_TH[:, 0] = 1.0
    with torch.no_grad():
        gate.weight[2, 0] += 6.0
    load_E = gate(x_TH, batch).selected_TE.sum(0)
    assert int(load_E.max()) <= 40 and int(load_E[2]) <= 32  # an even share is 16
    assert int(gate.eval()(x_TH, batch).selected_TE.sum(0)[2]) > 96


@pytest.mark.parametrize("options", [{"top_k": 0}, {"iterations": -1}, {"temperature": 0.0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SinkhornOptions(**options)


def test_more_experts_per_token_than_there_are():
    with pytest.raises(ValueError, match="only 2 experts"):
        SinkhornGate(4, 2, SinkhornOptions(3))
