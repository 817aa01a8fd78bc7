"""Which checkpoints stay on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """A checkpoint stays when any of these wants it."""

    newest: int = 2
    """So many of the newest ones."""
    every_steps: int = 0
    """Those whose step is a multiple of it, for ever; 0: none."""
    every_hours: float = 0.0
    """The first one of each period of so many hours since the run's first checkpoint, for ever; 0: none."""


@dataclass(frozen=True)
class Saved:
    step: int
    at: float
    """Seconds since the epoch."""


def obsolete(saved: Sequence[Saved], retention: Retention) -> list[int]:
    """Steps of those that go, rising. What was saved later counts as newer, also where its step is an earlier one (a
    run that went back)."""
    ordered = sorted(saved, key=lambda one: (one.at, one.step))
    stay = {one.step for one in ordered[-max(1, retention.newest) :]}
    if retention.every_steps:
        stay |= {one.step for one in ordered if one.step % retention.every_steps == 0}
    if retention.every_hours and ordered:
        periods: set[int] = set()
        for one in ordered:
            period = int((one.at - ordered[0].at) // (3600 * retention.every_hours))
            if period not in periods:
                periods.add(period)
                stay.add(one.step)
    return sorted({one.step for one in ordered} - stay)
