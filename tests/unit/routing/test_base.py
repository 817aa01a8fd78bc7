from __future__ import annotations

import itertools
import math

import pytest
import torch

from moe_train.routing import BaseGate, BaseOptions


def logits_of(x_TH, weight_EH):
    return [[sum(float(a * b) for a, b in zip(x, row, strict=True)) for row in weight_EH] for x in x_TH]


@pytest.mark.parametrize("pool", ["sequence", "micro_batch"])
def test_transcription(pool, make_batch, fresh_seed):
    """Lewis et al. 2021, eq. 2 to 5: the best of all even assignments by trying every one; weight sigmoid."""
    batch = make_batch([5, 3], 5)
    gate = BaseGate(6, 3, BaseOptions(pool)).double()
    torch.nn.init.normal_(gate.weight)
    x_TH = torch.randn(10, 6, dtype=torch.float64)
    logits = logits_of(x_TH, gate.weight.detach())
    want = [[0.0] * 3 for _ in range(10)]
    sequences = [[t for t in range(10) if t % 2 == b] for b in range(2)]
    for group in sequences if pool == "sequence" else [list(range(10))]:
        real = [t for t in group if not batch.padding_T[t]]
        few, many = len(real) // 3, -(-len(real) // 3)
        even = (
            choice
            for choice in itertools.product(range(3), repeat=len(real))
            if all(few <= choice.count(e) <= many for e in range(3))
        )
        best = max(even, key=lambda choice: sum(logits[t][e] for t, e in zip(real, choice, strict=True)))
        for t, e in zip(real, best, strict=True):
            want[t][e] = 1 / (1 + math.exp(-logits[t][e]))
    torch.testing.assert_close(gate(x_TH, batch).weights_TE.tolist(), want, rtol=1e-9, atol=1e-13)


def test_evaluation_takes_the_best_expert(make_batch, fresh_seed):
    batch = make_batch([6, 4], 6)
    gate = BaseGate(6, 4).double().eval()
    torch.nn.init.normal_(gate.weight)
    x_TH = torch.randn(12, 6, dtype=torch.float64)
    weights_TE = gate(x_TH, batch).weights_TE
    for t, row in enumerate(logits_of(x_TH, gate.weight.detach())):
        best = max(range(4), key=lambda e: row[e])
        want = [1 / (1 + math.exp(-v)) if e == best and not batch.padding_T[t] else 0.0 for e, v in enumerate(row)]
        torch.testing.assert_close(weights_TE[t].tolist(), want, rtol=1e-9, atol=1e-13)


def test_recomputation_solves_nothing(make_batch, monkeypatch):
    batch, gate = make_batch([6], 6), BaseGate(4, 3)
    x_TH = torch.randn(6, 4)
    first = gate(x_TH, batch)
    monkeypatch.setattr("moe_train.routing.gates.base.balanced_assignment", None)
    assert torch.equal(gate(x_TH, batch, replay_TE=first.selected_TE).weights_TE, first.weights_TE)
