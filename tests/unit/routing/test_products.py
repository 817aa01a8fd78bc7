"""Multiply-adds that gates say they need, against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_train.routing import LatentPrototypeGate
from tests.unit.routing.conformance import tokens_of


@pytest.fixture(autouse=True)
def no_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of losses and statistics are not counted; only those of lpr grow with the tokens."""
    monkeypatch.setattr(LatentPrototypeGate, "_regularise", lambda *_: None)


def counted(gate, make_batch, length: int) -> int:
    batch = make_batch([length], length)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        gate(tokens_of(batch, torch.float32), batch)
    return counter.get_total_flops()


def test_products_per_token_are_those_that_torch_counts(case, make_batch):
    """By the difference of two lengths: what is done once for all tokens (projected prototypes) is not a token's."""
    gate = case.gate.train()
    per_token = (counted(gate, make_batch, 24) - counted(gate, make_batch, 8)) / 16
    assert per_token == 2 * gate.products_per_token()
    assert (per_token > 0) == gate.reads_hidden
