"""Runs a launch to its end: passes on signals, notices a rank that dies, and says how it ended.

DeepSpeed's launcher terminates its workers when it is signalled and kills them half a minute later, in the middle of a
checkpoint. So it runs in a session of its own where Ctrl-C does not reach it; a signal that we get goes to the workers
alone, which save and end by themselves, and the launcher ends after them.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from moe_train.training.worker_status import WorkerStatus, forget, read_statuses

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Limits:
    """Seconds that a launch may take for what can hang."""

    stop: float = 300.0
    """From a signal until the workers have saved and ended."""
    death: float = 60.0
    """From a rank's death until the launcher has ended the others."""


class _Signals:
    def __init__(self) -> None:
        self.first: int | None = None
        self.count = 0

    def handle(self, number: int, _frame: object) -> None:
        self.first = self.first or number
        self.count += 1


@contextmanager
def _caught() -> Iterator[_Signals]:
    signals = _Signals()
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.signal(number, signals.handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def supervise(
    command: list[str],
    *,
    run_dir: Path,
    launch: str,
    environment: Mapping[str, str],
    local_processes: int | None,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    saves: bool = True,
    say: Callable[[str], None] = lambda text: print(f"moe-train: {text}", file=sys.stderr, flush=True),
) -> int:
    """Starts the command, waits for its end and returns the exit code of the run.

    0 when every worker finished; the code of the worker that failed first; 128 + the signal when it was stopped by one
    and every worker had saved. ``local_processes``: how many workers must report their end; None if they are elsewhere.
    ``saves=False``: the workers have nothing to save, so that a signal ends them at once.
    """
    with _caught() as signals:
        # Nothing reads from the terminal, and a session of its own may not.
        launcher = subprocess.Popen(command, env=dict(environment), start_new_session=True, stdin=subprocess.DEVNULL)
        try:
            dead = _watch(launcher, run_dir, launch, signals, limits, saves, say)
        finally:
            _end_everything(launcher, run_dir, launch)
    statuses = read_statuses(run_dir, launch)
    forget(run_dir, launch)
    if signals.first and not saves:
        return 128 + signals.first
    return _outcome(statuses, dead, launcher.returncode, signals.first, local_processes, saves, say)


def _watch(
    launcher: subprocess.Popen[bytes], run_dir: Path, launch: str, signals: _Signals, limits: Limits, saves: bool,
    say: Callable[[str], None],
) -> list[int]:  # fmt: skip
    """Returns at the launcher's end, or when it is to be killed; the ranks that were seen to die first."""
    told: set[int] = set()
    dead: list[int] = []
    stop_at = death_at = float("inf")
    while launcher.poll() is None:
        statuses = read_statuses(run_dir, launch)
        now = time.monotonic()
        if signals.count and not saves:
            return dead
        if signals.count:
            if stop_at == float("inf"):
                say(f"{_name(signals.first)}: waiting for the workers to save and stop (a second time kills them)")
                stop_at = now + limits.stop
            # Also those that start only now.
            told |= _tell(statuses, told)
        if death_at == float("inf"):
            failed = any(status.exit_code for status in statuses)
            # At the first sign only: once one has failed, launchers end the others, which are no cause.
            dead = [status.rank for status in statuses if status.died]
            if failed or dead:
                death_at = now + limits.death
        if signals.count > 1 or now > stop_at:
            say("killing the workers" + ("" if signals.count > 1 else f": not stopped after {limits.stop:g} s"))
            return dead
        if now > death_at:
            say(f"a rank has died {limits.death:g} s ago; killing the others")
            return dead
        time.sleep(POLL_SECONDS)
    return dead


def _tell(statuses: list[WorkerStatus], told: set[int]) -> set[int]:
    newly = set()
    for status in statuses:
        if status.pid not in told and status.exit_code is None and (process := status.process()):
            with suppress(psutil.Error):
                process.send_signal(signal.SIGTERM)
            newly.add(status.pid)
    return newly


def _end_everything(launcher: subprocess.Popen[bytes], run_dir: Path, launch: str) -> None:
    """Nothing that was started stays behind, also when the launcher itself was killed."""
    left: dict[int, psutil.Process] = {}
    with suppress(psutil.Error):
        parent = psutil.Process(launcher.pid)
        left = {process.pid: process for process in [*parent.children(recursive=True), parent]}
    for status in read_statuses(run_dir, launch):
        if process := status.process():
            left[process.pid] = process
    for process in left.values():
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(list(left.values()), timeout=10)
    launcher.wait()


def _outcome(
    statuses: list[WorkerStatus],
    dead: list[int],
    launcher_code: int,
    stopped_by: int | None,
    local_processes: int | None,
    saves: bool,
    say: Callable[[str], None],
) -> int:
    silent = [status.rank for status in statuses if status.exit_code is None and status.is_local]
    failed = sorted((status for status in statuses if status.exit_code), key=lambda status: status.ended or 0.0)
    if stopped_by and silent and not dead and not failed:
        say("killed before all had saved; go on from the last complete checkpoint with --resume auto")
        return 128 + stopped_by
    if silent and (dead or not failed):
        # Whoever ended without a word was killed or crashed; others may have failed because of it, or before it.
        say(
            f"rank {', '.join(map(str, dead or silent))} died without a word: it was killed (out of memory?) or it "
            "crashed." + (" Complete checkpoints are untouched; go on with --resume auto" if saves else "")
        )
    if failed:
        first = failed[0]
        assert first.exit_code is not None
        say(f"rank {first.rank} failed with exit code {first.exit_code}: {first.error or 'see above'}")
        return first.exit_code
    if silent:
        return _positive(launcher_code)
    if stopped_by:
        return 128 + stopped_by
    if any(status.stopped for status in statuses):
        say("stopped on request of another process, everything saved; go on with --resume auto")
        return 128 + signal.SIGTERM
    if launcher_code:
        say(f"the launcher failed with exit code {launcher_code}; see above")
        return _positive(launcher_code)
    finished = sum(status.exit_code == 0 for status in statuses)
    if local_processes is not None and finished < local_processes:
        say(f"only {finished} of {local_processes} workers reported their end")
        return 1
    return 0


def _positive(code: int) -> int:
    """Exit code for a shell: a signal as 128 + its number; a failure is never 0."""
    return 128 - code if code < 0 else code or 1


def _name(number: int | None) -> str:
    return signal.Signals(number).name if number else "stop"
