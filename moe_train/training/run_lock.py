"""One run at a time in a folder: two would write into each other's checkpoints (a job that was submitted twice, or one
that is not quite dead)."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moe_train.parallel.first_rank import from_rank_0

LOCK = ".lock"
_POLL_SECONDS = 0.2
_SOMEBODY = "another process"


class InUseError(OSError):
    """Another process has the folder. ``passing``: another start is to try again."""

    def __init__(self, text: str, *, passing: bool) -> None:
        super().__init__(text)
        self.passing = passing


@contextmanager
def only_run(run_dir: Path, seconds: float, *, goes_on: bool) -> Iterator[None]:
    """Keeps other runs out of the folder while the body runs; collective, rank 0 holds the lock.

    seconds: that another run may take to end.   goes_on: whether what the folder's run has saved last is wanted; what
    rank 0 says counts. Only that is worth another start, since restarts ask for just that: a new run, or one from
    another checkpoint, would go on with what somebody else has done meanwhile.
    Errors: InUseError, on every rank, where another process has the folder still.

    The lock goes with its process, however that ends; on a network disk only while the machine lives. One that is gone
    keeps it until the server gives it up (NFSv4: after 90 s; NFSv3: when that machine has started again), or until
    somebody removes the file. A file system that has no locks keeps nobody out.
    """
    held: list[int] = []
    try:
        refused = from_rank_0(lambda: (_take(run_dir, seconds, held), goes_on))
        if refused[0]:
            raise InUseError(refused[0], passing=refused[1])
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _take(run_dir: Path, seconds: float, held: list[int]) -> str:
    """Puts the open file that has the lock into ``held``, nothing where there can be no lock; or says who has it."""
    path = run_dir / LOCK
    deadline = time.monotonic() + seconds
    told = False
    while True:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            # Each time anew: where somebody removes the file, the lock is that of the next one.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # whoever writes next will say it
            return ""
        try:
            # Of the process, not of the open file: processes that it forks do not hold it longer.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                break
            holder = _SOMEBODY
        except (BlockingIOError, PermissionError):
            holder = _holder(descriptor)
        except OSError as error:
            if error.errno != errno.ESTALE:  # else another machine has removed the file: that disk does have locks
                os.close(descriptor)
                return ""
            holder = _SOMEBODY
        os.close(descriptor)
        if time.monotonic() > deadline:
            return (
                f"{run_dir}: {holder} trains in this folder; stop it or wait for its end, or choose another folder "
                f"with --run-dir. Only if that machine is gone for good, remove {path}"
            )
        if not told:
            print(f"moe-train: {run_dir}: waiting for {holder}, which trains here", file=sys.stderr, flush=True)
            told = True
        time.sleep(_POLL_SECONDS)
    held.append(descriptor)
    with suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return ""


def _holder(descriptor: int) -> str:
    """As it has written itself into the file."""
    with suppress(OSError):
        return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or _SOMEBODY
    return _SOMEBODY


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether it is this file that others find there: the lock of one that was removed keeps nobody out."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
