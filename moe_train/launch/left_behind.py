"""Processes of a launch on this machine, also when what started them is gone."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from contextlib import suppress

import psutil

from moe_train.training.worker_status import WorkerStatus

_ROUNDS = 5


def end_processes(launcher: subprocess.Popen[bytes], launch: str, statuses: Callable[[], list[WorkerStatus]]) -> None:
    """Kills the launcher, all that it started and all workers, until none is left: a launcher may start one while the
    others are killed."""
    for _ in range(_ROUNDS):
        found = _processes(launcher, launch, statuses())
        if not found:
            break
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs([process for process in found if process.pid != launcher.pid], timeout=10)
    launcher.wait()


def _processes(launcher: subprocess.Popen[bytes], launch: str, statuses: list[WorkerStatus]) -> list[psutil.Process]:
    """One whose launcher is gone is no child of it any more, torchrun gives each a session of its own, and one that has
    just started has no status yet: but the name of the launch is in its command line."""
    roots = [process for status in statuses if (process := status.process())]
    if launcher.poll() is None:  # else its number may be that of another process by now
        with suppress(psutil.Error):
            roots.append(psutil.Process(launcher.pid))
    roots += [process for process in psutil.process_iter() if _is_of(process, launch)]
    found: dict[int, psutil.Process] = {}
    for root in roots:
        with suppress(psutil.Error):
            found |= {process.pid: process for process in [*root.children(recursive=True), root]}
    found.pop(os.getpid(), None)
    return [process for process in found.values() if _lives(process)]


def _is_of(process: psutil.Process, launch: str) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return process.pid != os.getpid() and f" --status {launch} " in f"{' '.join(words)} "


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
