"""What is wrong with the options of the guard."""

from __future__ import annotations

import math
from collections.abc import Iterator

from moe_train.config.errors import Problem
from moe_train.training.options import CheckpointOptions, GuardOptions


def guard_problems(guard: GuardOptions, checkpoint: CheckpointOptions) -> Iterator[Problem]:
    for name, lowest in (
        ("window", 2),
        ("max_in_a_row", 0),
        ("max_skips", 0),
        ("rewind_steps", 0),
        ("max_rewinds", 0),
        ("replica_every", 0),
    ):
        if (value := getattr(guard, name)) < lowest:
            yield Problem(f"guard.{name}", f"must be at least {lowest}, got {value}")
    if not 0 < guard.threshold < math.inf:
        yield Problem("guard.threshold", f"must be a number greater than 0, got {guard.threshold}")
    for name in ("non_finite", "spike"):
        if getattr(guard, name) == "rewind" and not (checkpoint.every_steps or checkpoint.every_minutes):
            yield Problem(f"guard.{name}", "rewind goes back to the latest checkpoint: set checkpoint.every_steps")
