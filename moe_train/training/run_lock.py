"""One run at a time in a folder: two would write into each other's checkpoints (a job that was submitted twice, or one
that is not quite dead)."""

from __future__ import annotations

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


@contextmanager
def only_run(run_dir: Path, seconds: float) -> Iterator[None]:
    """Keeps other runs out of the folder while the body runs; collective, rank 0 holds the lock.

    seconds: that another run may take to end. Errors: ValueError, on every rank, where one still has the folder then.
    The lock goes with its process, however that ends. A file system that has no locks keeps nobody out.
    """
    held: list[int] = []
    try:
        from_rank_0(lambda: held.extend(_take(run_dir, seconds)))
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _take(run_dir: Path, seconds: float) -> list[int]:
    """The open file that holds the lock; none where there can be no lock."""
    path = run_dir / LOCK
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # whoever writes next will say it
        return []
    deadline = time.monotonic() + seconds
    told = False
    while True:
        try:
            # Of the process, not of the open file: processes that it forks do not hold it longer.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        except OSError:
            os.close(descriptor)
            return []
        if time.monotonic() > deadline:
            os.close(descriptor)
            raise ValueError(
                f"{run_dir}: {holder} trains in this folder; stop it or wait for its end, or choose another folder "
                "with --run-dir"
            )
        if not told:
            print(f"moe-train: {run_dir}: waiting for {holder}, which trains here", file=sys.stderr, flush=True)
            told = True
        time.sleep(_POLL_SECONDS)
    with suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return [descriptor]
