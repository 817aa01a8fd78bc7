"""Ranks none of which makes progress any more."""

from __future__ import annotations

import dataclasses

from moe_train.launch.standstill import Standstill
from moe_train.training.heartbeat import Beat
from moe_train.training.worker_status import WorkerStatus


def status(rank: int, pid: int) -> WorkerStatus:
    return WorkerStatus(rank, pid, "far", 0.0)


def beat(of: WorkerStatus, time: float, progress: float) -> Beat:
    return Beat(of.rank, of.host, of.pid, time, 5, "train", progress, "", 0, False, "")


def test_ranks_that_stand_still() -> None:
    workers = [status(0, 11), status(1, 12)]
    watch = Standstill(10.0)
    for now in range(40):
        # The clocks are a day behind and a day ahead, which says nothing; rank 1 works until 20.
        beats = [beat(workers[0], now - 86400.0, -86400.0), beat(workers[1], now + 86400.0, min(now, 20) + 86400.0)]
        assert watch.look(workers, beats, float(now)) == (beats if now > 30 else []), now


def test_a_clock_that_is_set() -> None:
    """On all machines at once, also on this one."""
    worker = status(0, 11)
    watch = Standstill(10.0)
    for now in range(30):
        clock = now + (3600.0 if now > 15 else 0.0)
        step = 5 * (now // 5)
        assert watch.look([worker], [beat(worker, clock, float(step))], float(now)) == []


def test_the_beat_of_a_process_that_was_replaced() -> None:
    """As with torchrun, which starts a rank again under the same name: the new one must not be killed for the old."""
    old, new, other = status(0, 11), status(0, 12), status(1, 13)
    stuck = beat(new, 9.0, 9.0)
    watch = Standstill(60.0)
    assert watch.look([old], [beat(old, 0.0, 0.0)], 0.0) == []
    assert watch.look([new], [beat(old, 0.0, 0.0)], 90.0) == []
    assert watch.look([new], [stuck], 90.0) == []
    assert watch.look([new], [stuck], 151.0) == [stuck]
    assert watch.look([new, other], [stuck], 151.0) == [], "a rank that has not written yet has just begun"
    assert watch.look([dataclasses.replace(new, exit_code=0)], [stuck], 151.0) == []
