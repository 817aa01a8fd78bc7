"""How auxiliary losses enter the backward pass, and what a recomputation sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_train.model.micro_batch import (
    MicroBatch,
    as_root,
    attach_losses,
    current,
    use,
    use_for_recomputation,
)
from moe_train.routing.interface import LossTerm, TokenBatch

NOTHING = torch.zeros(0, dtype=torch.int64)
TOKENS = TokenBatch(NOTHING, NOTHING, NOTHING, NOTHING.bool(), sequence_length=0, batch_size=0)


def totals() -> dict[str, Tensor]:
    return {"token": torch.tensor(64.0), "sequence": torch.tensor(4.0), "micro_batch": torch.tensor(2.0)}


def forward(w: Tensor, v: Tensor, micro_batch: MicroBatch) -> Tensor:
    """Two layers with an auxiliary loss each; returns the language loss."""
    hidden = attach_losses(w * 3, {"a": LossTerm((w**2).sum(), torch.tensor(8), "token", 0.5)}, micro_batch)
    losses = {
        "b": LossTerm((v**3).sum(), torch.tensor(2), "sequence", 0.25),
        "c": LossTerm((w * v).sum(), torch.tensor(1), "micro_batch", 2.0),
    }
    return (attach_losses(hidden * v, losses, micro_batch)).sum()


@pytest.mark.parametrize("factor", [1.0, 8.0, 1 / 3])
def test_gradient_is_that_of_the_sum_of_losses(factor: float) -> None:
    """Pitfall 1: AM#1408/PR1412. Whatever the engine multiplies the language loss with, auxiliary losses follow."""
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    v = torch.randn(5, dtype=torch.float64, requires_grad=True)
    micro_batch = MicroBatch(TOKENS, totals())
    loss = as_root(forward(w, v, micro_batch), micro_batch)
    got = torch.autograd.grad(loss * factor, (w, v))
    auxiliary = 0.5 * (w**2).sum() / 64 + 0.25 * (v**3).sum() / 4 + 2.0 * (w * v).sum() / 2
    want = torch.autograd.grad(((w * 3 * v).sum() + auxiliary) * factor, (w, v))
    without = torch.autograd.grad((w * 3 * v).sum() * factor, (w, v))
    for g, x, other in zip(got, want, without, strict=True):
        torch.testing.assert_close(g, x, rtol=1e-12, atol=1e-14)
        assert not torch.allclose(g, other, rtol=1e-3)


def test_values_are_untouched() -> None:
    w = torch.randn(5, requires_grad=True)
    with_losses, without = (forward(w, w, MicroBatch(TOKENS, t)) for t in (totals(), None))
    assert torch.equal(with_losses, without)


def test_nothing_is_attached_in_evaluation() -> None:
    hidden = torch.randn(3, requires_grad=True)
    term = {"a": LossTerm(hidden.sum(), torch.tensor(1), "token", 1.0)}
    assert attach_losses(hidden, term, MicroBatch(TOKENS, None)) is hidden
    with torch.no_grad():
        assert attach_losses(hidden, term, MicroBatch(TOKENS, totals())) is hidden
    assert attach_losses(hidden, {}, MicroBatch(TOKENS, totals())) is hidden


def test_a_backward_pass_around_the_root_is_noticed() -> None:
    w = torch.randn(5, requires_grad=True)
    loss = forward(w, w, MicroBatch(TOKENS, totals()))
    with pytest.raises(AssertionError, match="as_root"):
        loss.backward()


def test_a_missing_micro_batch_is_noticed() -> None:
    with pytest.raises(AssertionError, match="with use"):
        current()


def test_recomputation_sees_its_own_micro_batch() -> None:
    """In the backward pass another micro-batch, or none, is active; and autograd may use another thread."""
    seen: list[tuple[MicroBatch, bool]] = []

    def layer(x: Tensor) -> Tensor:
        seen.append((current(), current().recomputing))
        return torch.sin(x)

    def run(micro_batch: MicroBatch, x: Tensor) -> Tensor:
        import contextlib

        with use(micro_batch):
            return checkpoint(
                layer,
                x,
                use_reentrant=False,
                context_fn=lambda: (contextlib.nullcontext(), use_for_recomputation(micro_batch)),
            )

    first, second = MicroBatch(TOKENS), MicroBatch(TOKENS)
    x = torch.randn(3, requires_grad=True)
    y_first, y_second = run(first, x), run(second, x)
    with use(second):
        y_first.sum().backward()
    y_second.sum().backward()
    assert [(m is first, again) for m, again in seen] == [(True, False), (False, False), (True, True), (False, True)]
    assert not first.recomputing and not second.recomputing
