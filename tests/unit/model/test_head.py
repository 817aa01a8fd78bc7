"""The head: loss and logits over the true vocabulary only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_train.model.head import LanguageModelHead

SEQUENCE, BATCH, HIDDEN, VOCABULARY, ROWS = 5, 3, 8, 11, 16


def make(rows: int = ROWS, chunk: int | None = 4) -> tuple[LanguageModelHead, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64))
    hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    target = torch.rand(BATCH, SEQUENCE, generator=generator) > 0.4
    return LanguageModelHead(weight, VOCABULARY, chunk), hidden, labels, target


@pytest.mark.parametrize("rows", [VOCABULARY, ROWS])
@pytest.mark.parametrize("chunk", [4, None])
def test_loss_of_each_position_comes_from_its_own_logits(rows: int, chunk: int | None) -> None:
    head, hidden, labels, target = make(rows, chunk)
    nll_sum, nll_BS = head(hidden, labels, target)
    logits_BSV = head(hidden)
    assert logits_BSV.shape == (BATCH, SEQUENCE, VOCABULARY)
    for b in range(BATCH):
        for s in range(SEQUENCE):
            probability = torch.softmax(hidden[s, b] @ head.weight[:VOCABULARY].T, 0)[labels[b, s]]
            want = -torch.log(probability) if target[b, s] else torch.zeros((), dtype=torch.float64)
            torch.testing.assert_close(nll_BS[b, s], want.detach(), rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(logits_BSV[b, s], hidden[s, b] @ head.weight[:VOCABULARY].T)
    torch.testing.assert_close(nll_sum, nll_BS.sum(), rtol=1e-12, atol=0)


def test_padding_rows_take_no_part() -> None:
    head, hidden, labels, target = make()
    before = head(hidden, labels, target)[0]
    before.backward()
    assert not head.weight.grad[VOCABULARY:].any() and head.weight.grad[:VOCABULARY].any()
    with torch.no_grad():
        head.weight[VOCABULARY:] = 1e6
    assert torch.equal(head(hidden, labels, target)[0], before)
