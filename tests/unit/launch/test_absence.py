"""Launches without a worker that runs."""

from __future__ import annotations

import dataclasses

from moe_train.launch.absence import Absence
from moe_train.training.worker_status import WorkerStatus

WORKER = WorkerStatus(0, 11, "far", 0.0)
FAILED, FINISHED = (dataclasses.replace(WORKER, exit_code=code) for code in (1, 0))


def found(watch: Absence, statuses: list[WorkerStatus], begin: int, end: int) -> list[int]:
    return [now for now in range(begin, end) if watch.look(statuses, float(now))]


def test_none_has_ever_started() -> None:
    assert found(Absence(10.0), [], 0, 30) == [11, 22]


def test_none_is_started_after_others() -> None:
    """By torchrun, which starts workers again."""
    watch = Absence(10.0)
    assert found(watch, [WORKER], 0, 30) == []
    assert found(watch, [FAILED], 30, 45) == [40]


def test_those_that_have_finished_are_not_missed() -> None:
    watch = Absence(10.0)
    assert found(watch, [FINISHED], 0, 30) == found(watch, [FAILED, WORKER], 30, 60) == []


def test_a_disk_that_is_away_says_nothing() -> None:
    watch = Absence(10.0)
    assert found(watch, [WORKER], 0, 5) == found(watch, [], 5, 100) == []
