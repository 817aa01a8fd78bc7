"""The gradients of a step before the optimizer sees them: their norm, and throwing them away (DeepSpeed 0.19.8, private
API included).

Upstream computes the norm inside of the optimizer's step, and whether it then steps by gradients that are not finite
depends on the ZeRO stage and the precision. Here the norm is computed before, by upstream's own function and once, so
that a step can be refused while parameters, moments and gate state are untouched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Gradients:
    """Those of one ZeRO optimizer of stage 1, 2 or 3, after the last micro-batch's backward pass."""

    def __init__(self, zero: Any, stage: int) -> None:
        self.zero, self.stage = zero, stage
        self._name = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
        self._compute = getattr(zero, self._name)
        self._held: Any = None
        setattr(zero, self._name, self._answer)

    def norm(self) -> Tensor:
        """Global norm over all parameters, before clipping: a float32 scalar on the device, infinite or negative where
        some gradient is not finite. The optimizer's step uses it and computes none. Collective."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        if hasattr(self.zero, "_wait_for_offload_copies"):
            self.zero._wait_for_offload_copies()
        self._held = self._compute()
        norm: Tensor = combine_grad_norm_groups(self._held) if self.stage == 3 else self._held
        return norm

    @contextlib.contextmanager
    def refused(self) -> Iterator[None]:
        """Inside, the optimizer's step is the one that upstream makes of gradients that overflowed: it clears them and
        moves nothing."""
        invalid = torch.tensor(-1.0, device=self.zero.device)
        self._held = [invalid] if self.stage == 3 else invalid
        # ZeRO 1 and 2 look at the norm only by option.
        looks = {name: getattr(self.zero, name) for name in self._looks()}
        for name in looks:
            setattr(self.zero, name, True)
        try:
            yield
        finally:
            self._held = None
            for name, value in looks.items():
                setattr(self.zero, name, value)
            # Upstream keeps those of an optimizer that is offloaded, and adds the next step's to them.
            for group in self.zero.averaged_gradients:
                self.zero.averaged_gradients[group] = None

    def not_finite(self) -> list[nn.Parameter]:
        """Parameters of whose gradient this rank holds a part that is not finite. Empty where the optimizer is
        offloaded: its gradients have left the device."""
        zero = self.zero
        if self.stage == 3:
            indices = [] if zero.offload_optimizer else range(len(zero.fp16_groups))
            groups = [(zero.averaged_gradients[i], zero.fp16_groups[i]) for i in indices]
        elif zero.cpu_offload:
            groups = []
        else:
            groups = [(zero.averaged_gradients[i], zero.params_in_partition[i]) for i in range(len(zero.bit16_groups))]
        found = []
        for gradients, parameters in groups:
            real = (g for g in gradients or () if not getattr(g, "_zero_padding", False))
            found += [p for g, p in zip(real, parameters, strict=False) if g is not None and not g.isfinite().all()]
        return found

    def _looks(self) -> tuple[str, ...]:
        return () if self.stage == 3 else ("check_grad_overflow", "compute_grad_norm")

    def _answer(self, *_: Any, **__: Any) -> Any:
        held, self._held = self._held, None
        return self._compute() if held is None else held
