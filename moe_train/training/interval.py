"""Adds up the steps between two records."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from moe_train.training.record import IntervalSums, build_record
from moe_train.training.step import StepResult


class Interval:
    """Sums since the last record. Time outside of training steps (validation, saving) is left out of the speed."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.steps = self.tokens = self.loss_count = 0
        self.loss_sum = self.seconds = 0.0
        self.layers: list[int] = []
        self.load_LE: Tensor | None = None
        self.kept_LE: Tensor | None = None
        self.k_histogram_LN: Tensor | None = None
        self.losses: list[dict[str, tuple[float, float]]] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Called after a pause: the time since the last step is not training time."""
        self.since = time.perf_counter()

    def add(self, result: StepResult) -> None:
        """One finished step, which took the time since the last one."""
        now = time.perf_counter()
        self.seconds += now - self.since
        self.since = now
        self.steps += 1
        self.tokens += result.tokens
        self.loss_sum += result.loss_sum
        self.loss_count += result.loss_count
        self.layers = result.layers
        self.load_LE = result.load_LE if self.load_LE is None else self.load_LE + result.load_LE
        self.kept_LE = result.kept_LE if self.kept_LE is None else self.kept_LE + result.kept_LE
        more_LN = result.k_histogram_LN
        if more_LN is not None:
            self.k_histogram_LN = more_LN if self.k_histogram_LN is None else self.k_histogram_LN + more_LN
        self.losses = (
            [_sum(a, b) for a, b in zip(self.losses, result.losses, strict=True)] if self.losses else result.losses
        )

    def record(self, **values: Any) -> dict[str, Any]:
        """The record of this interval (see build_record for ``values``); a new one begins."""
        assert self.load_LE is not None and self.kept_LE is not None
        sums = IntervalSums(
            steps=self.steps,
            seconds=self.seconds,
            tokens=self.tokens,
            loss_sum=self.loss_sum,
            loss_count=self.loss_count,
            layers=self.layers,
            load_LE=self.load_LE,
            kept_LE=self.kept_LE,
            k_histogram_LN=self.k_histogram_LN,
            losses=self.losses,
        )
        record = build_record(sums=sums, **values)
        self._clear()
        return record


def _sum(a: dict[str, tuple[float, float]], b: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    return {name: (a[name][0] + b[name][0], a[name][1] + b[name][1]) for name in a}
