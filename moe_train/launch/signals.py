"""Signals that end a launch, remembered instead of obeyed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from moe_train.training.stop import stop_signals


class Signals:
    def __init__(self) -> None:
        self.first: int | None = None
        self.count = 0

    def handle(self, number: int, _frame: object) -> None:
        self.first = self.first or number
        self.count += 1


@contextmanager
def caught() -> Iterator[Signals]:
    signals = Signals()
    before = {number: signal.signal(number, signals.handle) for number in stop_signals()}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
