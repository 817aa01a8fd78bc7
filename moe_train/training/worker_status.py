"""<run>/processes/<launch>.rank_<r>.json: who a worker process is and how it ended.

Launchers kill the workers when they are told to stop. So the one who launched speaks to the workers directly, and needs
to know them; and a launcher that was killed itself reports success, so each worker says itself how it ended.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

FOLDER = "processes"
_ROOM = 4096
"""Bytes of a status with spaces behind."""
_SHORT = 600
"""Characters of an error that fit in, whatever they are."""


@dataclass(frozen=True)
class WorkerStatus:
    rank: int
    pid: int
    host: str
    created: float
    """Start time of the process: a process id may be given to another process later."""
    exit_code: int | None = None
    """None while it runs, or when it died without a word."""
    error: str | None = None
    """One line on why it failed."""
    ended: float | None = None
    """Seconds since the epoch."""
    stopped: bool = False
    """It was asked to stop before its last step, by whomever, and did so."""

    @property
    def is_local(self) -> bool:
        return self.host == socket.gethostname()

    def process(self) -> psutil.Process | None:
        """The live process, or None if it has ended or runs on another machine."""
        if not self.is_local:
            return None
        try:
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.created) > 1.0 or process.status() == psutil.STATUS_ZOMBIE:
                return None
            return process
        except psutil.Error:
            return None

    @property
    def died(self) -> bool:
        """True for a worker of this machine that has gone without saying how it ended."""
        return self.exit_code is None and self.is_local and self.process() is None


class StatusFile:
    """The file of this process; with an empty launch name nobody asked for one, and nothing is written."""

    def __init__(self, run_dir: Path, launch: str, rank: int) -> None:
        self.path = run_dir / FOLDER / f"{launch}.rank_{rank}.json" if launch else None
        created = psutil.Process().create_time()
        # All ranks do as the first one says: the others need not read the files of all on a disk that they share.
        self.is_later = rank == 0 and bool(launch) and _has_ended(run_dir, launch)
        """Whether the launch has had workers before, which are gone; known on rank 0."""
        self.status = WorkerStatus(rank, os.getpid(), socket.gethostname(), created)

    @property
    def beat_path(self) -> Path | None:
        """Of the file that says what the process is doing (heartbeat.py)."""
        return None if self.path is None else self.path.with_suffix(".beat")

    def start(self) -> None:
        self._write()

    def finish(self, exit_code: int, error: str | None = None, stopped: bool = False) -> None:
        self.status = replace(self.status, exit_code=exit_code, error=error, ended=time.time(), stopped=stopped)
        try:
            self._write()
        except OSError:
            pass  # the disk may be why we end; the exit code of the process says the same

    def _write(self) -> None:
        if self.path is None:
            return
        short = replace(self.status, error=self.status.error and self.status.error[:_SHORT])
        write_sign(self.path, _content(self.status), _content(short))


def _content(status: WorkerStatus) -> str:
    """As JSON, with room for what there is to say at the end."""
    return json.dumps(asdict(status)).ljust(_ROOM)


def write_sign(path: Path, text: str, short: str | None = None) -> None:
    """Replaces the file; where a disk that is full takes no new one, what is there is written over (with ``short`` in
    place of the text): whoever watches over the launch must not take the process for dead, nor for killed when it ends.
    OSError where neither can be done."""
    temporary = path.with_suffix(f"{path.suffix}.tmp")
    try:
        _write_new(temporary, text)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        if not path.is_file():
            error.filename = error.filename or str(path)  # what writing raises names none
            raise
        # One call, of the file's length: a shorter text would end in what is left of the old one. Who reads half of
        # each looks again.
        with path.open("r+b", buffering=0) as file:
            file.write((text if short is None else short).encode().ljust(path.stat().st_size))


def _write_new(path: Path, text: str) -> None:
    """In a folder that any launch which ends removes if it is empty, also between our making it and the file."""
    for left in reversed(range(100)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        except (FileNotFoundError, FileExistsError):  # the latter: mkdir met it, and looked what it is when it was gone
            if not left:
                raise


def cannot_write(run_dir: Path) -> str:
    """Why a file cannot be written where those of launches lie; empty where it can."""
    path = run_dir / FOLDER / f"{socket.gethostname()}.{os.getpid()}.probe"
    try:
        path.write_bytes(bytes(4096))
        return ""
    except OSError as error:
        return error.strerror or str(error)
    finally:
        with suppress(OSError):
            path.unlink()


def read_statuses(run_dir: Path, launch: str) -> list[WorkerStatus]:
    """The workers of one launch that have started, by rank."""
    return sorted(_statuses(run_dir, launch), key=lambda status: status.rank)


def files_of(run_dir: Path, pattern: str) -> list[Path]:
    """Those of launches; none where their disk is away for a moment: who watches over a launch looks again."""
    try:
        return list((run_dir / FOLDER).glob(pattern))
    except OSError:
        return []


def _statuses(run_dir: Path, launch: str) -> Iterator[WorkerStatus]:
    for path in files_of(run_dir, f"{launch}.rank_*.json"):
        try:
            yield WorkerStatus(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue  # not readable yet; the next look will see it


def _has_ended(run_dir: Path, launch: str) -> bool:
    """Whether any worker of the launch has."""
    return any(status.exit_code is not None or status.died for status in _statuses(run_dir, launch))


def forget(run_dir: Path, launch: str, rank: int | None = None) -> None:
    """Removes the files of a launch that has ended, or only those of one of its ranks."""
    for path in files_of(run_dir, f"{launch}.rank_{'*' if rank is None else f'{rank}.*'}"):
        with suppress(OSError):  # it is gone, or its disk is away; it means nothing to other launches
            path.unlink()
    try:
        (run_dir / FOLDER).rmdir()
    except OSError:
        pass  # another rank or launch of the same run still uses it, or it never existed
