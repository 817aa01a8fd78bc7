"""Runs a launch to its end: passes on signals, notices a rank that dies or ranks that hang, and says how it ended.

DeepSpeed's launcher terminates its workers when it is signalled and kills them half a minute later, in the middle of a
checkpoint. So it runs in a session of its own where Ctrl-C does not reach it; a signal that we get goes to the workers
alone, which save and end by themselves, and the launcher ends after them.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from moe_train.launch.absence import Absence
from moe_train.launch.ending import Ending, Seen, judge
from moe_train.launch.left_behind import end_processes
from moe_train.launch.signals import Signals, caught
from moe_train.launch.silence import Silence
from moe_train.launch.standstill import Standstill
from moe_train.training.heartbeat import Beat, describe, read_beats
from moe_train.training.worker_status import WorkerStatus, cannot_write, forget, read_statuses

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Limits:
    """Seconds that a launch may take for what can hang."""

    stop: float = 300.0
    """From a signal until the workers have saved and ended."""
    workers: float = 30.0
    """From a signal until there are workers that could save; a launcher without any may wait for other nodes."""
    death: float = 60.0
    """From a rank's death until the launcher has ended the others."""
    silence: float = 120.0
    """That a worker of another machine may write no heartbeat for while others do, before it counts as dead."""
    last_words: float = 30.0
    """From the end of a launcher that says it went well until workers of other machines say so: a network disk may show
    what they wrote late."""
    hang: float = 1800.0
    """That no rank may make any progress for, and that there may be no worker, before all are killed; 0: for ever."""
    meeting: float = 0.0
    """That launchers of several nodes may wait for one another before they start workers."""
    restarts_itself: bool = False
    """The launcher starts workers anew when one dies, so that a death is its affair (torchrun)."""

    def __post_init__(self) -> None:
        if not self.hang >= 0:
            raise ValueError(f"--hang-timeout must be a number of seconds, or 0 for never, got {self.hang:g}")


class Elsewhere(Protocol):
    """Workers of one launch on machines where no signal of ours reaches them."""

    def tell(self) -> None:
        """Asks them to save and stop."""

    def run(self) -> bool:
        """Whether there are any."""

    def sweep(self) -> None:
        """Ends what is left of them."""


def supervise(
    command: list[str],
    *,
    run_dir: Path,
    launch: str,
    environment: Mapping[str, str],
    local_processes: int | None,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    saves: bool = True,
    elsewhere: Elsewhere | None = None,
    say: Callable[[str], None] = lambda text: print(f"moe-train: {text}", file=sys.stderr, flush=True),
) -> Ending:
    """Starts the command and waits for its end.

    ``local_processes``: how many workers must report their end; None if they are elsewhere. ``saves=False``: the
    workers have nothing to save, so that a signal ends them at once. ``elsewhere``: reaches workers of other machines.
    """
    with caught() as signals:
        # Nothing reads from the terminal, and a session of its own may not. SIGUSR1 is for the workers, which listen to
        # it: Slurm sends it to all processes of a step, and would end the launcher with it.
        line = ["/bin/sh", "-c", "trap '' USR1; exec \"$@\"", "sh", *command]
        launcher = subprocess.Popen(line, env=dict(environment), start_new_session=True, stdin=subprocess.DEVNULL)
        seen, code = Seen(), 1
        try:
            seen = _watch(launcher, run_dir, launch, signals, limits, saves, elsewhere, say)
            # One that is ended now says nothing by its code.
            code = 1 if launcher.poll() is None else launcher.returncode
        finally:
            end_processes(launcher, launch, lambda: read_statuses(run_dir, launch))
            if elsewhere is not None:
                elsewhere.sweep()
        if local_processes is None and code == 0:
            _await_last_words(run_dir, launch, limits.last_words)
    statuses = read_statuses(run_dir, launch)
    if limits.restarts_itself and local_processes is not None:
        # Several nodes that start again may give out ranks in another order: then those of before are there as well.
        statuses = sorted(statuses, key=lambda status: status.created)[-local_processes:]
    forget(run_dir, launch)
    if signals.first and not saves:
        return Ending(128 + signals.first)
    return judge(statuses, seen, code, signals.first, local_processes, saves, say)


def _watch(
    launcher: subprocess.Popen[bytes], run_dir: Path, launch: str, signals: Signals, limits: Limits, saves: bool,
    elsewhere: Elsewhere | None, say: Callable[[str], None],
) -> Seen:  # fmt: skip
    """Returns at the launcher's end, or when it is to be killed; with what was seen until then."""
    told: set[int] = set()
    seen = Seen()
    silence, absence = Silence(limits.silence), Absence(limits.hang + limits.meeting)
    standstill = Standstill(limits.hang, lambda: cannot_write(run_dir), say)
    stop_at = death_at = workers_at = float("inf")
    while launcher.poll() is None:
        statuses = read_statuses(run_dir, launch)
        now = time.monotonic()
        if signals.count and not saves:
            return seen
        if signals.count:
            if stop_at == float("inf"):
                say(f"{_name(signals.first)}: waiting for the workers to save and stop (a second time kills them)")
                stop_at, workers_at = now + limits.stop, now + limits.workers
                # One rank that knows is enough, and one of this machine is told more quickly.
                if elsewhere is not None and not any(status.process() for status in statuses):
                    elsewhere.tell()
            if elsewhere is not None or any(status.process() for status in statuses):
                workers_at = now + limits.workers
            elif now > workers_at:
                say(f"no worker for {limits.workers:g} s that could save; ending the launcher")
                return seen
            # Also those that start only now.
            told |= _tell(statuses, told)
        if death_at == float("inf") and not limits.restarts_itself:
            failed = any(status.exit_code for status in statuses)
            # At the first sign only: once one has failed, launchers end the others, which are no cause.
            silent = silence.look(statuses, read_beats(run_dir, launch), now)
            seen = Seen(dead=[status.rank for status in statuses if status.died] + silent)
            if failed or seen.dead:
                death_at = now + limits.death
                if seen.dead:
                    _tell_state(f"rank {', '.join(map(str, seen.dead))} is gone", read_beats(run_dir, launch), say)
        if signals.count > 1 or now > stop_at:
            say("killing the workers" + ("" if signals.count > 1 else f": not stopped after {limits.stop:g} s"))
            return seen
        if now > death_at:
            say(f"a rank has died {limits.death:g} s ago; killing the others")
            return seen
        if limits.hang and (beats := standstill.look(statuses, read_beats(run_dir, launch), now)):
            _tell_state(f"no rank has made progress for {limits.hang:g} s; killing all", beats, say)
            if not limits.restarts_itself:
                return Seen(hung="no rank made progress")
            _kill_workers(statuses)
        if limits.hang and not signals.count and absence.look(statuses, now):
            what = f"no worker has started within {absence.seconds:g} s"
            if elsewhere is None or not elsewhere.run():
                say(f"{what}; ending the launcher")
                return Seen(hung="no worker has started")
            say(f"{what} as far as this machine sees, but some run on the hosts: is the run's folder on a common disk?")
        time.sleep(POLL_SECONDS)
    return seen


def _tell_state(head: str, beats: list[Beat], say: Callable[[str], None]) -> None:
    say("\n".join([f"{head}. What they were doing:", *(f"  {describe(beat)}" for beat in beats)]))


def _kill_workers(statuses: list[WorkerStatus]) -> None:
    for status in statuses:
        if status.exit_code is None and (process := status.process()):
            with suppress(psutil.Error):
                process.kill()


def _tell(statuses: list[WorkerStatus], told: set[int]) -> set[int]:
    newly = set()
    for status in statuses:
        if status.pid not in told and status.exit_code is None and (process := status.process()):
            with suppress(psutil.Error):
                # Not SIGTERM, by which torchrun's agents end those that are left when a worker has died.
                process.send_signal(signal.SIGUSR1)
            newly.add(status.pid)
    return newly


def _await_last_words(run_dir: Path, launch: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(status.exit_code is None for status in read_statuses(run_dir, launch)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _name(number: int | None) -> str:
    return signal.Signals(number).name if number else "stop"
