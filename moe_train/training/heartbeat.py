"""<run>/processes/<launch>.rank_<r>.beat: what a worker is doing, written every second while it runs.

A thread of its own writes it, so that it goes on while the training waits in a collective; its age says whether the
process runs at all.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from moe_train.parallel.collectives import LastCollective
from moe_train.training.worker_status import files_of, write_sign

INTERVAL = 1.0
_PACKAGE = f"{os.sep}moe_train{os.sep}"


@dataclass(frozen=True)
class Beat:
    """All times in seconds since the epoch."""

    rank: int
    host: str
    pid: int
    time: float
    step: int
    """Optimizer steps taken."""
    phase: str
    """start, load, train, save, validate or end."""
    progress: float
    """When step, phase, collective or the place in the program changed last, looked at once a second."""
    collective: str
    """The one that was entered last; empty before the first."""
    collective_number: int
    """How many were entered."""
    inside: bool
    """Whether the call has not returned yet."""
    where: str
    """The line of ours that is running, and the innermost one."""


class Heartbeat:
    """Says what this process is doing. Without a path nobody asked, and nothing is written."""

    def __init__(self, path: Path | None, rank: int) -> None:
        self.path, self.rank = path, rank
        self.last_collective = LastCollective()
        self._step, self._phase, self._progress = 0, "start", time.time()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._main = threading.main_thread().ident or 0
        self._seen: tuple[object, ...] = ()

    def start(self) -> None:
        """Begins to write; OSError where it cannot."""
        if self.path is None:
            return
        self._write()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def note(self, phase: str, step: int | None = None) -> None:
        """Progress: the process is in this phase now."""
        self._phase = phase
        self._step = self._step if step is None else step

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def now(self) -> Beat:
        last, frame = self.last_collective, sys._current_frames().get(self._main)
        seen = (self._step, self._phase, last.number, last.inside, *_stack(frame))
        if seen != self._seen:
            self._seen, self._progress = seen, time.time()
        return Beat(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            time=time.time(),
            step=self._step,
            phase=self._phase,
            progress=self._progress,
            collective=last.name,
            collective_number=last.number,
            inside=last.inside,
            where=place(frame),
        )

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            try:
                self._write()
            except OSError:
                pass  # a disk that is away is not the heart's to report

    def _write(self) -> None:
        assert self.path is not None
        write_sign(self.path, json.dumps(asdict(self.now())))


def _stack(frame: FrameType | None) -> list[tuple[int, int]]:
    """Which instruction of which code runs, from the innermost out."""
    found = []
    while frame is not None:
        found.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return found


def place(frame: FrameType | None) -> str:
    """The innermost line of this package, and the innermost of all where that is another."""
    innermost, ours = frame, None
    while frame is not None and ours is None:
        ours = frame if _PACKAGE in frame.f_code.co_filename else None
        frame = frame.f_back
    lines = [_line(found) for found in (ours, innermost) if found is not None]
    return " > ".join(dict.fromkeys(lines))


def describe(beat: Beat, now: float | None = None) -> str:
    """One line for a person."""
    now = time.time() if now is None else now
    parts = [f"rank {beat.rank} on {beat.host}: step {beat.step}, {beat.phase}"]
    if now - beat.progress > 3 * INTERVAL:
        parts[0] += f", nothing new for {now - beat.progress:.0f} s"
    if beat.collective:
        which = "in" if beat.inside else "last"
        parts.append(f"{which} collective {beat.collective} (number {beat.collective_number})")
    if beat.where:
        parts.append(f"at {beat.where}")
    if now - beat.time > 10 * INTERVAL:
        parts.append(f"no sign of life for {now - beat.time:.0f} s")
    return ", ".join(parts)


def read_beats(run_dir: Path, launch: str) -> list[Beat]:
    """The last ones of a launch's workers, by rank."""
    found = []
    for path in files_of(run_dir, f"{launch}.rank_*.beat"):
        try:
            found.append(Beat(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue  # being replaced; the next look will see it
    return sorted(found, key=lambda beat: beat.rank)


def _line(frame: FrameType) -> str:
    parts = Path(frame.f_code.co_filename).parts
    return f"{'/'.join(parts[-3:])}:{frame.f_lineno} {frame.f_code.co_name}"
