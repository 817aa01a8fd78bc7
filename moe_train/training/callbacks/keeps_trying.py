"""Writers of metrics that need not work all the time (checkpoint.on_error=continue)."""

from __future__ import annotations

import sys
from collections import deque
from contextlib import suppress

from moe_train.training.callbacks.base import Callback, MetricsWriteError, Record, RunInfo, Status

KEPT = 1000
"""Records that wait for the disk: some hundred MiB where there are very many experts, else little."""


class KeepsTrying(Callback):
    """Passes records on to a writer. Those that it cannot write wait, the newest ``keep`` of them, and are tried again
    in their order with each later record, and at the end; what fails, and when it works again, is said once.

    The writer raises MetricsWriteError for a record (or a start) that it has not written, and takes it again.
    """

    def __init__(self, writer: Callback, name: str, keep: int = KEPT) -> None:
        self.writer, self.name, self.keep = writer, name, keep
        self._start: RunInfo | None = None
        """The start that the writer has not managed yet."""
        self._waiting: deque[Record] = deque()
        self._lost = 0
        """Records dropped since it failed."""
        self._fails = False

    def on_start(self, run: RunInfo) -> None:
        self._start = run
        self._write()

    def on_record(self, record: Record) -> None:
        self._waiting.append(record)
        self._write()

    def on_end(self, status: Status) -> None:
        self._write()
        if self._waiting or self._lost:
            _say(f"{self.name} lacks {_records(len(self._waiting) + self._lost)} of this run: it could not be written")
        try:
            self.writer.on_end(status)
        except OSError as error:
            if not self._fails:
                _say(f"{self.name} could not be closed: {error}")

    def _write(self) -> None:
        waited = len(self._waiting)
        try:
            if self._start is not None:
                self.writer.on_start(self._start)
                self._start = None
            while self._waiting:
                self.writer.on_record(self._waiting[0])
                self._waiting.popleft()
        except MetricsWriteError as error:
            if not self._fails:
                _say(
                    f"cannot write metrics to {error.filename} ({error.reason}). The run goes on "
                    f"(checkpoint.on_error=continue) and keeps up to {self.keep:,} records until that works again: "
                    "free some space or fix the folder"
                )
            self._fails = True
            while len(self._waiting) > self.keep:
                self._waiting.popleft()
                self._lost += 1
            return
        if self._fails:
            lost = f", {_records(self._lost)} before them got lost" if self._lost else ""
            _say(f"{self.name} can be written again: {_records(waited)} that had to wait went into it{lost}")
        self._fails, self._lost = False, 0


def _records(number: int) -> str:
    return f"{number:,} record{'s' if number != 1 else ''}"


def _say(text: str) -> None:
    with suppress(OSError):  # the log may lie on the same disk
        print(f"moe-train: warning: {text}", file=sys.stderr, flush=True)
