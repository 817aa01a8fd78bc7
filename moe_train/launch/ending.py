"""How a launch ended, judged from what its workers said of themselves."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_train.training.worker_status import WorkerStatus

WRONG_INPUT = 2
"""Exit code of a worker whose input is wrong, or that could not write: a second try would meet the same."""
NOT_SAVED = 128 + signal.SIGQUIT
"""Exit code of a run that was to stop by a signal, and ended before all was saved. Not below 128, which is a failure
for what makes pods anew; and none that something else ends with."""
_SAVED = {128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
BAD_NUMBERS = 3
"""Exit code of a worker whose run stops because of its numbers: another start would meet them again."""


@dataclass(frozen=True)
class Ending:
    code: int
    """Exit code of the run: 0 finished, 128 + signal when it was stopped by one and has saved, NOT_SAVED when not."""
    reason: str = ""
    """One line; empty where it finished or was stopped."""
    restart: bool = False
    """Whether another start may go better."""
    began: bool = True
    """Whether there has been a worker. Where there was none at the first start, the launcher itself cannot run; later,
    what kept it from starting them may pass."""


@dataclass(frozen=True)
class Seen:
    """What the watch over a launch has seen."""

    dead: Sequence[int] = ()
    """Ranks that were gone without a word first."""
    hung: str = ""
    """Why all were killed, where nothing went on any more."""


def judge(
    statuses: Sequence[WorkerStatus],
    seen: Seen,
    launcher_code: int,
    stopped_by: int | None,
    local_processes: int | None,
    saves: bool,
    say: Callable[[str], None],
) -> Ending:
    """local_processes: workers that must report their end; None if they are elsewhere.   saves: whether the workers
    save before they stop."""
    unheard = [status for status in statuses if status.exit_code is None]
    silent = [status.rank for status in unheard if status.is_local]
    # Those of several commands, one on each node, are judged by their own command.
    lost = [status.rank for status in unheard] if local_processes is None else []
    failed = sorted((status for status in statuses if status.exit_code), key=lambda status: status.ended or 0.0)
    if stopped_by and (silent or lost) and not seen.dead and not failed:
        say("killed before all had saved; go on from the last complete checkpoint with --resume auto")
        return Ending(NOT_SAVED)
    reason = seen.hung
    if silent and not seen.hung and (seen.dead or not failed):
        # Whoever ended without a word was killed or crashed; others may have failed because of it, or before it.
        ranks = ", ".join(map(str, seen.dead or silent))
        reason = f"rank {ranks} died without a word: it was killed (out of memory?) or it crashed"
        say(f"{reason}." + (" Complete checkpoints are untouched; go on with --resume auto" if saves else ""))
    if failed:
        first = failed[0]
        assert first.exit_code is not None
        line = f"rank {first.rank} failed with exit code {first.exit_code}: {first.error or 'see above'}"
        say(line)
        again = bool(reason) or first.exit_code not in (WRONG_INPUT, BAD_NUMBERS)
        return Ending(_failure(first.exit_code), reason or line, restart=again and not stopped_by)
    if reason:
        return Ending(_failure(launcher_code), reason, restart=not stopped_by)
    if stopped_by:
        # Those that are elsewhere may be seen by nobody, and have ended well where their launcher has.
        if len(statuses) < (local_processes or 0) or not (statuses or launcher_code == 0):
            say("ended before all workers had started, so nothing new is saved; go on with --resume auto")
            return Ending(NOT_SAVED)
        return Ending(128 + stopped_by)
    if any(status.stopped for status in statuses):
        say("stopped on request of another process, everything saved; go on with --resume auto")
        return Ending(128 + signal.SIGTERM)
    if launcher_code:
        reason = f"the launcher failed with exit code {launcher_code}"
        say(f"{reason}; see above")
        # A signal came from outside (out of memory?): nothing is wrong with what the launcher was started with.
        again = bool(statuses) or launcher_code < 0
        return Ending(_failure(launcher_code), reason, restart=again, began=bool(statuses))
    finished = sum(status.exit_code == 0 for status in statuses)
    if local_processes is not None and finished < local_processes:
        reason = f"only {finished} of {local_processes} workers reported their end"
        say(reason)
        return Ending(1, reason, restart=bool(statuses), began=bool(statuses))
    # DeepSpeed's launcher ends with 0 when pdsh was killed. What workers write onto another disk is seen by nobody.
    if lost:
        reason = (
            f"rank {', '.join(map(str, lost))} has not reported its end: pdsh was killed, or the connection was lost"
        )
        say(reason)
        return Ending(1, reason, restart=True)
    return Ending(0)


def _failure(code: int) -> int:
    """Exit code for a shell: a signal as 128 + its number; a failure is never 0, and never one that says all is saved
    (as where somebody else has sent SIGTERM to the launcher)."""
    code = 128 - code if code < 0 else code
    return 1 if code in {0, NOT_SAVED, *_SAVED} else code
