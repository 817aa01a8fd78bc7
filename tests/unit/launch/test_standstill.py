"""Ranks none of which makes progress any more."""

from __future__ import annotations

import dataclasses

import pytest

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
        # Told once, and then the time begins anew.
        assert watch.look(workers, beats, float(now)) == (beats if now == 31 else []), now


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
    for now in range(90, 151):
        alive = dataclasses.replace(stuck, time=float(now))
        assert watch.look([new], [alive], float(now)) == []
    assert watch.look([new, other], [alive], 151.0) == [], "a rank that has not written yet has just begun"
    assert watch.look([dataclasses.replace(new, exit_code=0)], [alive], 151.0) == []
    assert watch.look([new], [alive], 151.0) == [alive]


def test_a_disk_that_takes_no_heartbeats() -> None:
    """It is full from 5 on. Whether the ranks work cannot be told until there is room again, and then soon."""
    worker = status(0, 11)
    full, said = True, list[str]()
    watch = Standstill(10.0, lambda: "No space left on device" if full else "", said.append)
    for now in range(100):
        assert watch.look([worker], [beat(worker, min(now, 5), min(now, 5))], float(now)) == []
    assert len(said) == 1 and "No space left on device" in said[0]
    full = False
    for now in range(100, 102):
        assert watch.look([worker], [beat(worker, 5, 5)], float(now)) == [], "room, and the beat comes within a second"
    for now in range(102, 112):
        assert watch.look([worker], [beat(worker, now, 99)], float(now)) == []


def test_processes_that_are_frozen_all_at_once() -> None:
    """Nothing is wrong with the disk."""
    workers = [status(0, 11), status(1, 12)]
    watch = Standstill(10.0)
    beats = [beat(worker, 5, 5) for worker in workers]
    found = [now for now in range(40) if watch.look(workers, beats, float(now))]
    assert found[:1] == [21]


@pytest.mark.parametrize("seen", [True, False])
def test_a_disk_that_was_away_for_long(seen: bool) -> None:
    """The look itself has waited for it, or has seen nothing; the first one after it finds beats as old as that."""
    worker = status(0, 11)
    watch = Standstill(10.0)
    for now in range(6):
        assert watch.look([worker], [beat(worker, now, now)], float(now)) == []
    for now in range(6, 500, 7):
        if not seen:
            assert watch.look([], [], float(now)) == []
    assert watch.look([worker], [beat(worker, 5, 5)], 500.0) == []
    assert watch.look([worker], [beat(worker, 501, 501)], 501.0) == []
