"""A polite request to stop, by SIGTERM, SIGUSR1 or Ctrl-C: the loop finishes its step, saves and ends."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Remembers the first signal; a second Ctrl-C interrupts at once.

    The loop reads ``requested`` between two steps. All ranks must agree before they act on it (one may have been told a
    step earlier), so the loop reduces the flag over the ranks.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.obeyed = False
        """Whether the run has stopped before its last step, everything saved: this or another rank was asked to."""
        self._interrupts = 0

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def install(self) -> StopRequest:
        """Takes over these signals; only in the main thread of a process."""
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGUSR1, self._handle)
        signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
