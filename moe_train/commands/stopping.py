"""SIGTERM, by which Slurm and others end a job, as Ctrl-C: what is open is closed, and the user is told."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


@contextmanager
def can_be_stopped(advice: str) -> Iterator[None]:
    """While the body runs SIGTERM raises in the main thread as Ctrl-C does: KeyboardInterrupt, or `Terminated`.

    advice: what the command line says behind "interrupted". A second SIGTERM changes nothing.
    """
    ours = threading.current_thread() is threading.main_thread()  # elsewhere Python lets nobody handle signals
    before = signal.signal(signal.SIGTERM, _terminate) if ours else None
    try:
        yield
    except KeyboardInterrupt as stop:
        raise type(stop)(advice) from None
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        raise Terminated(advice) from None  # Ray puts its own handler in the place of ours, which ends like this
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a group of processes and its parent may both be signalled
    raise Terminated
