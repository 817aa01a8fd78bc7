"""Which failures are tried again, and for how long."""

from __future__ import annotations

import pytest

from moe_train.launch import restart
from moe_train.launch.ending import Ending
from moe_train.launch.restart import keep_running

CRASH = Ending(137, "rank 1 died", restart=True)


class Run:
    """Each start reaches the next of the steps, and ends as it says."""

    def __init__(self, *starts: tuple[int, Ending]) -> None:
        self.starts = list(starts)
        self.step = -1
        self.numbers: list[int] = []
        self.said: list[str] = []

    def start(self, number: int) -> Ending:
        self.numbers.append(number)
        self.step, ending = self.starts[number]
        return ending

    def go(self, max_restarts: int) -> int:
        return keep_running(self.start, lambda: self.step, max_restarts, self.said.append)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr(restart.time, "sleep", pauses.append)
    return pauses


def test_what_finishes_is_not_started_again() -> None:
    run = Run((10, Ending(0)))
    assert run.go(5) == 0 and run.numbers == [0] and run.said == []


def test_without_restarts_nothing_is_said_twice() -> None:
    run = Run((10, CRASH))
    assert run.go(0) == 137 and run.said == []


def test_it_goes_on_until_it_finishes() -> None:
    run = Run((10, CRASH), (20, CRASH), (30, Ending(0)))
    assert run.go(5) == 0 and run.numbers == [0, 1, 2]
    assert run.said[:2] == ["restart 1 of at most 5, from step 10", "restart 2 of at most 5, from step 20"]


def test_what_would_fail_again_is_not_tried() -> None:
    run = Run((10, CRASH), (10, Ending(2, "wrong input")))
    assert run.go(5) == 2 and run.numbers == [0, 1]
    assert Run((0, Ending(143))).go(5) == 143, "a run that was stopped stays so"


def test_a_launcher_that_started_no_worker_is_tried_again_only_later() -> None:
    """At the first start it cannot run at all; later the hosts do not answer for a moment."""
    none = Ending(1, "the launcher failed", began=False)
    assert Run((-1, none)).go(5) == 1
    run = Run((10, CRASH), (10, none), (20, Ending(0)))
    assert run.go(5) == 0 and run.numbers == [0, 1, 2]


def test_it_gives_up_when_no_restart_is_left() -> None:
    run = Run(*[(10 * n, CRASH) for n in range(1, 9)])
    assert run.go(3) == 137 and run.numbers == [0, 1, 2, 3]
    assert run.said[-1].splitlines() == [
        "giving up: no restart is left",
        "  start 1, from the beginning to step 10: rank 1 died",
        "  start 2, from step 10 to step 20: rank 1 died",
        "  start 3, from step 20 to step 30: rank 1 died",
        "  start 4, from step 30 to step 40: rank 1 died",
    ]


def test_it_gives_up_where_nothing_is_gained(no_pause: list[float]) -> None:
    run = Run((10, CRASH), (10, CRASH), (20, CRASH), (20, CRASH), (20, CRASH), (20, CRASH), (30, Ending(0)))
    assert run.go(50) == 137 and len(run.numbers) == 6
    assert "3 starts in a row brought no new checkpoint" in run.said[-1]
    assert no_pause == sorted(no_pause[:2]) + no_pause[2:], "longer where nothing was gained"
