from __future__ import annotations

import math

import torch

from moe_train.routing import DenseGate


def test_transcription(make_batch, fresh_seed):
    batch = make_batch([6, 4], 6)
    gate = DenseGate(5, 7).double()
    torch.nn.init.normal_(gate.weight)
    x_TH = torch.randn(12, 5, dtype=torch.float64)
    routing = gate(x_TH, batch)
    for t in range(12):
        logits = [sum(float(x * w) for x, w in zip(x_TH[t], row, strict=True)) for row in gate.weight.detach()]
        total = sum(math.exp(v) for v in logits)
        want = [0.0 if batch.padding_T[t] else math.exp(v) / total for v in logits]
        torch.testing.assert_close(routing.weights_TE[t].tolist(), want, rtol=1e-10, atol=1e-14)
        assert routing.selected_TE[t].tolist() == [not bool(batch.padding_T[t])] * 7
