"""A transformer layer whose activations are computed again in the backward pass."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_train.model.micro_batch import current, use_for_recomputation
from moe_train.model.upstream import TransformerLayer


class _RecomputeNow(torch.autograd.Function):
    """Identity that reads a saved tensor when its gradient arrives, which starts the layer's recomputation.

    Under ZeRO-3 the MoE layer is gathered when the gradient reaches its output. Were the recomputation started by an
    operation inside of it, its own forward hook would release the parameters again before they are used.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.new_empty(0))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return grad


class RecomputedLayer(TransformerLayer):
    """The checkpoint is inside ``forward``, so that the engine's hooks on this module (ZeRO-3) stay outside of it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        micro_batch = current()
        micro_batch.recompute = True
        return checkpoint(
            self._forward,
            *args,
            use_reentrant=False,
            # Nothing here draws from the global generator, and noise is counter-based.
            preserve_rng_state=False,
            early_stop=False,
            context_fn=lambda: (contextlib.nullcontext(), use_for_recomputation(micro_batch)),
            **kwargs,
        )

    def _forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        hidden, context = super().forward(*args, **kwargs)
        return _RecomputeNow.apply(hidden), context
