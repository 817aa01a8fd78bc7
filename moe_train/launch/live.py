"""Whether the workers of this machine are alive, by the age of their heartbeats: for health checks."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from pathlib import Path

from moe_train.training.heartbeat import read_beats
from moe_train.training.worker_status import files_of, read_statuses


def sign_of_life(run_dir: Path, max_age: float, *, host: str | None = None, now: float | None = None) -> str:
    """One line on the workers that run on ``host`` (this one).

    max_age: seconds that each worker's last heartbeat may be old. Only the launch that gave the newest sign counts: one
    that was killed leaves its files. Workers that have ended need not beat while others still run.
    Errors: ValueError where no worker has started yet, or one gives no sign of life.
    """
    host = socket.gethostname() if host is None else host
    now = time.time() if now is None else now
    launches = {path.name.split(".rank_")[0] for path in files_of(run_dir, "*.rank_*.beat")}
    found = [signs for launch in sorted(launches) if (signs := _signs(run_dir, launch, host))]
    if not found:
        raise ValueError(f"{run_dir}: no worker of {host} has started, or all have ended")
    newest = max(found, key=lambda signs: max(sign.time for sign in signs))
    running = [sign for sign in newest if not sign.ended]
    # Where all have ended, the launch is about to say so, or to start again.
    oldest = min(running, key=lambda sign: sign.time) if running else max(newest, key=lambda sign: sign.time)
    age = now - oldest.time
    if age > max_age:
        raise ValueError(
            f"{run_dir}: rank {oldest.rank} on {host} has given no sign of life for {age:.0f} s, "
            f"more than {max_age:g} s"
        )
    return f"{len(running)} workers run on {host}, the oldest sign of life is {max(0.0, age):.0f} s old"


@dataclass(frozen=True)
class _Sign:
    rank: int
    time: float
    """Seconds since the epoch."""
    ended: bool
    """It was that of its end."""


def _signs(run_dir: Path, launch: str, host: str) -> list[_Sign]:
    """The last ones of the launch's workers on the host."""
    ended = {
        status.rank: status.ended or 0.0
        for status in read_statuses(run_dir, launch)
        if status.host == host and status.exit_code is not None
    }
    return [
        _Sign(beat.rank, max(beat.time, ended.get(beat.rank, 0.0)), beat.rank in ended)
        for beat in read_beats(run_dir, launch)
        if beat.host == host
    ]
