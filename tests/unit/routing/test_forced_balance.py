from __future__ import annotations

import math

import pytest
import torch

from moe_train.routing import BalancedGate, ForcedBalanceGate, ForcedBalanceOptions
from moe_train.routing.options import RouterOptions


@pytest.mark.parametrize(("k", "renormalize"), [(1, False), (2, True), (3, True), (3, False)])
def test_transcription(k, renormalize, make_batch, fresh_seed):
    batch = make_batch([8, 5], 8, samples=[3, 10])
    gate = ForcedBalanceGate(6, 8, ForcedBalanceOptions(k, renormalize)).double()
    torch.nn.init.normal_(gate.weight)
    x_TH = torch.randn(16, 6, dtype=torch.float64)
    routing = gate(x_TH, batch)
    for t in range(16):
        logits = [sum(float(x * w) for x, w in zip(x_TH[t], row, strict=True)) for row in gate.weight.detach()]
        total = sum(math.exp(v) for v in logits)
        p = [math.exp(v) / total for v in logits]
        start = int(batch.position_T[t]) * k + int(batch.sample_T[t])
        turn = set() if batch.padding_T[t] else {(start + j) % 8 for j in range(k)}
        divisor = sum(p[e] for e in turn) if renormalize else 1.0
        want = [p[e] / divisor if e in turn else 0.0 for e in range(8)]
        torch.testing.assert_close(routing.weights_TE[t].tolist(), want, rtol=1e-10, atol=1e-14)


def test_the_selection_is_that_of_the_switch_for_any_gate(make_batch):
    batch = make_batch([8, 8, 8], 8, samples=[4, 9, 2])
    x_TH = torch.randn(24, 6)
    switched = BalancedGate(RouterOptions("softmax_topk", {"top_k": 3}, forced_balance=True), 6, 8)
    routing = BalancedGate(RouterOptions("forced_balance", {"top_k": 3}), 6, 8)(x_TH, batch)
    assert torch.equal(routing.selected_TE, switched(x_TH, batch).selected_TE)
    assert routing.sums["load"].tolist() == [9] * 8


def test_bad_options():
    with pytest.raises(ValueError, match="no gradient"):
        ForcedBalanceOptions(top_k=1)
    with pytest.raises(ValueError, match="top_k is 0"):
        ForcedBalanceOptions(top_k=0)
    with pytest.raises(ValueError, match="only 2 experts"):
        ForcedBalanceGate(4, 2, ForcedBalanceOptions(3))
