"""What travels beside the hidden states through one forward and backward pass of a micro-batch.

megatron-core's layers hand down hidden states and a padding mask only; token ids, positions, the totals of the step
and the place where losses and statistics are collected reach the MoE layers by a context variable. It is set around
the forward pass and again, by ``checkpoint``'s context_fn, around a recomputation in the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_train.model.cache import KeyValueCache
from moe_train.model.texts import Texts
from moe_train.routing.interface import LossTerm, Routing, TokenBatch

_current: ContextVar[MicroBatch | None] = ContextVar("moe_train_micro_batch", default=None)


@dataclass
class MicroBatch:
    """One micro-batch of one rank; made anew for each."""

    tokens: TokenBatch
    totals: dict[str, Tensor] | None = None
    """Float32 scalars per unit of LossTerm ("token", "sequence", "micro_batch", "multi_token") and "target": counts
    over all ranks and micro-batches of the optimizer step. None in evaluation: no auxiliary loss is attached."""
    texts: Texts | None = None
    """Texts that do not see each other; None where each sequence is one."""
    cache: KeyValueCache | None = None
    """Keys and values of what was read before; generation only."""
    predict_B: Tensor | None = None
    """The one position of each sequence, int64 [B], whose logits are wanted; None for all. Generation only: those of a
    whole prompt may not fit into memory."""
    sums: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Additive statistics per layer."""
    losses: dict[int, dict[str, LossTerm]] = field(default_factory=dict)
    """Detached auxiliary losses per layer."""
    keep_routings: bool = False
    routings: dict[int, Routing] = field(default_factory=dict)
    """The whole decision per layer, kept only where asked for (evaluation, tracing)."""
    selections: dict[int, Tensor] = field(default_factory=dict)
    """Selection of the first pass per layer, replayed in recomputation."""
    kept: dict[int, Tensor] = field(default_factory=dict)
    """What capacity left of it, where there is one; replayed likewise."""
    recomputing: bool = False
    recompute: bool = False
    """Whether a recomputation will come, so that selections must be kept."""
    gradient: Tensor | None = None
    """Gradient that the engine sent into the language loss; auxiliary losses get the same factor."""


def current() -> MicroBatch:
    """The micro-batch whose forward pass (or recomputation) is running."""
    micro_batch = _current.get()
    assert micro_batch is not None, "no micro-batch is active: call the model inside `with use(micro_batch)`"
    return micro_batch


@contextlib.contextmanager
def use(micro_batch: MicroBatch) -> Iterator[MicroBatch]:
    token = _current.set(micro_batch)
    try:
        yield micro_batch
    finally:
        _current.reset(token)


@contextlib.contextmanager
def use_for_recomputation(micro_batch: MicroBatch) -> Iterator[None]:
    """Restores the micro-batch of the first pass; autograd may run this in a thread of its own."""
    was = micro_batch.recomputing
    micro_batch.recomputing = True
    try:
        with use(micro_batch):
            yield
    finally:
        micro_batch.recomputing = was


class _RecordGradient(torch.autograd.Function):
    """Identity that notes the gradient which arrives at the language loss, the root of the backward pass."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, micro_batch: MicroBatch) -> Tensor:
        ctx.micro_batch = micro_batch
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.micro_batch.gradient = grad.detach()
        return grad, None


class _AttachLoss(torch.autograd.Function):
    """Identity on the hidden states that sends the language loss's own gradient factor into an auxiliary loss.

    So the gradient is that of ``language + auxiliary`` whatever the engine multiplies the language loss with
    (accumulation, data-parallel averaging, loss scaling), without the auxiliary loss leaving the layer.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, auxiliary: Tensor, micro_batch: MicroBatch) -> Tensor:
        ctx.micro_batch = micro_batch
        ctx.dtype = auxiliary.dtype
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        factor = ctx.micro_batch.gradient
        assert factor is not None, "backward() did not start at the loss that as_root() returned"
        return grad, factor.to(ctx.dtype), None


def as_root(loss: Tensor, micro_batch: MicroBatch) -> Tensor:
    """Marks the micro-batch's contribution to the language loss of the step; backward() must pass through it."""
    return _RecordGradient.apply(loss, micro_batch)


def attach_losses(hidden: Tensor, losses: dict[str, LossTerm], micro_batch: MicroBatch, share: float = 1.0) -> Tensor:
    """Attaches this layer's auxiliary losses, divided by the totals of the step, to the hidden states; ``share``: of
    them, where several ranks have the same."""
    if micro_batch.totals is None or not losses or not torch.is_grad_enabled():
        return hidden
    total: Tensor | None = None
    for term in losses.values():
        value = term.sum * (term.coefficient / micro_batch.totals[term.unit].to(term.sum.dtype))
        total = value if total is None else total + value
    assert total is not None
    return _AttachLoss.apply(hidden, total if share == 1 else total * share, micro_batch)
