"""The protocol of everything that receives metrics. Only rank 0 has callbacks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from moe_train.training.step import StepResult

Status = Literal["finished", "interrupted", "failed", "rewound"]
Record = dict[str, Any]
"""One object of metrics.jsonl; "kind" is "train", "eval", "alarm", "checkpoint" or "guard" (docs/metrics.md)."""


@dataclass(frozen=True)
class RunInfo:
    """What callbacks may know about the run."""

    name: str
    run_dir: Path
    total_steps: int
    start_step: int = 0
    """Steps taken before this process started; above 0 when a run is resumed."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration as plain values."""


class Callback:
    """Receives the records of a run. A subclass overrides what it needs."""

    def on_start(self, run: RunInfo) -> None:
        """Once, before the first step. A resumed run removes what it recorded after ``run.start_step``."""

    def on_step(self, step: int, result: StepResult) -> list[Record]:
        """Each optimizer step, from 1. Returns records that all callbacks are to receive."""
        return []

    def on_record(self, record: Record) -> None:
        """Each record, in the order of steps; not to be changed."""

    def on_end(self, status: Status) -> None:
        """Once, also after a failure."""


class Callbacks(Callback):
    """Passes everything on to several callbacks, in their order."""

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self.callbacks = list(callbacks)

    def on_start(self, run: RunInfo) -> None:
        for callback in self.callbacks:
            callback.on_start(run)

    def on_step(self, step: int, result: StepResult) -> list[Record]:
        """What the callbacks return has been passed on to all of them already."""
        records = [record for callback in self.callbacks for record in callback.on_step(step, result)]
        for record in records:
            self.on_record(record)
        return records

    def on_record(self, record: Record) -> None:
        for callback in self.callbacks:
            callback.on_record(record)

    def on_end(self, status: Status) -> None:
        """Ends every callback, also when one of them fails: a failure while closing a writer hides no other error."""
        for callback in self.callbacks:
            try:
                callback.on_end(status)
            except Exception as error:
                print(f"warning: {type(callback).__name__} could not end cleanly: {error}", file=sys.stderr)


class MetricsWriteError(OSError):
    """Metrics could not be written; the message says where and what to do."""

    reason = ""
    """In the system's words."""


def write_error(path: Path, error: OSError) -> MetricsWriteError:
    """The error to raise when writing to ``path`` failed."""
    reason = error.strerror or str(error)
    advice = "free some space or fix the folder, then resume the run"
    failure = MetricsWriteError(error.errno, f"cannot write metrics ({reason}); {advice}", str(path))
    failure.reason = reason
    return failure
