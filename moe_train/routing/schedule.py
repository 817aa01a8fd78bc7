"""A value that changes over the run: a number, or a ramp from one number to another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ramp:
    """``start`` up to step ``first_step``, then towards ``end``, which it is from ``first_step + steps`` on.

    Steps are optimizer steps, from 0. linear: in equal moves; cosine: along half a cosine, slow at both ends.
    """

    start: float = 0.0
    end: float = 0.0
    steps: int = 1000
    first_step: int = 0
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.first_step < 0:
            raise ValueError(
                f"a ramp of {self.steps} steps from step {self.first_step} on makes no sense: steps must be at least 1,"
                " first_step at least 0"
            )
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise ValueError(f"a ramp goes from one finite number to another, not from {self.start} to {self.end}")

    def at(self, step: int | Tensor) -> Tensor:
        """The value, float64 scalar; ``step`` may be a tensor, which is not read on the host."""
        done = torch.as_tensor(step).double().sub(self.first_step).div(self.steps).clamp(0, 1)
        if self.shape == "cosine":
            done = (1 - torch.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


def value_at(value: float | Ramp, step: int) -> float:
    """The value in optimizer step ``step`` (from 0), such as the coefficient of a loss."""
    return float(value.at(step)) if isinstance(value, Ramp) else value


def is_on(value: float | Ramp) -> bool:
    """Whether it is ever above 0: a loss whose coefficient is 0 for a while is still computed and logged then."""
    return bounds(value)[1] > 0


def bounds(value: float | Ramp) -> tuple[float, float]:
    """The smallest and the largest that it ever is, for checks of options."""
    return (min(value.start, value.end), max(value.start, value.end)) if isinstance(value, Ramp) else (value, value)
