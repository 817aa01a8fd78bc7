"""Starts a run again where it failed, as long as that leads anywhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from moe_train.launch.ending import Ending

PATIENCE = 3
"""Starts in a row that may bring no new checkpoint."""
_PAUSE_SECONDS = 1.0
"""Before a restart, so that a machine whose runs die at once is not kept busy with starting them."""


def keep_running(
    start: Callable[[int], Ending],
    latest_step: Callable[[], int],
    max_restarts: int,
    say: Callable[[str], None] = lambda text: print(f"moe-train: {text}", file=sys.stderr, flush=True),
) -> int:
    """Starts a run, and again up to ``max_restarts`` times where it failed for a reason that may pass; returns the exit
    code of the last start.

    start: starts the run for the n-th time, from 0.   latest_step: step of its latest checkpoint, -1 without one.
    A later start that brought no worker is tried again, too. Gives up earlier when PATIENCE starts in a row end without
    a new checkpoint. Says why, with a line for each start.
    """
    log: list[str] = []
    fruitless = 0
    before = latest_step()
    for number in range(max_restarts + 1):
        ending = start(number)
        if not ending.restart and (ending.began or not number):
            if log:
                say(f"ended with exit code {ending.code} after {len(log)} restarts")
            return ending.code
        now = latest_step()
        log.append(f"  start {number + 1}, from {_place(before)} to {_place(now)}: {ending.reason}")
        fruitless = 0 if now > before else fruitless + 1
        before = now
        if number == max_restarts or fruitless == PATIENCE:
            break
        say(f"restart {number + 1} of at most {max_restarts}, from {_place(now)}")
        time.sleep(_PAUSE_SECONDS * 2**fruitless)
    if max_restarts:
        why = f"{PATIENCE} starts in a row brought no new checkpoint" if fruitless == PATIENCE else "no restart is left"
        say("\n".join([f"giving up: {why}", *log]))
    return ending.code


def _place(step: int) -> str:
    return "the beginning" if step < 0 else f"step {step:,}"
