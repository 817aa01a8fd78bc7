"""A polite request to stop, by SIGTERM, SIGUSR1, SIGHUP or Ctrl-C: the loop finishes its step, saves and ends."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from types import FrameType

AGENT_SECONDS = 5.0
"""How long after a SIGTERM of an agent a request to stop may arrive."""


def stop_signals() -> list[signal.Signals]:
    """SIGHUP not under nohup, which has it ignored: the run is to outlive its terminal."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *hangup]


class StopRequest:
    """Remembers the first signal; a second Ctrl-C interrupts at once.

    The loop reads ``requested`` between two steps. All ranks must agree before they act on it (one may have been told a
    step earlier), so the loop reduces the flag over the ranks.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.obeyed = False
        """Whether the run has stopped before its end, everything saved: this or another rank was asked to."""
        self._interrupts = 0
        self._agent = False

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def install(self) -> StopRequest:
        """Takes over these signals; only in the main thread of a process."""
        for number in stop_signals():
            signal.signal(number, self._handle)
        return self

    def obey_agent(self) -> StopRequest:
        """Under a supervisor that asks for a stop by SIGUSR1: SIGTERM then comes from torchrun's agent, because a
        worker has died or the nodes meet anew. Nothing can be saved with those that are gone, and the agent waits: the
        process ends, also where its main thread waits for a rank that is gone. Unless the agent was itself told to stop
        together with the supervisor, whose SIGUSR1 then follows.
        """
        self._agent = True
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # Filled by the interpreter's own handler, also while the main thread is inside a library.
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=_end_after_sigterm, args=(reader,), name="signals", daemon=True).start()
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._agent and number == signal.SIGTERM:
            return
        self.signal = self.signal or number
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt


def _end_after_sigterm(reader: int) -> None:
    seen: set[int] = set()
    while signal.SIGTERM not in seen:
        seen |= set(os.read(reader, 64))
    while not seen & {signal.SIGUSR1, signal.SIGINT}:
        if not select.select([reader], [], [], AGENT_SECONDS)[0]:
            print("moe-train: the launcher ends this worker, since others are gone", file=sys.stderr, flush=True)
            os._exit(128 + signal.SIGTERM)
        seen |= set(os.read(reader, 64))
