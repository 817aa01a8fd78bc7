"""What the end of a worker means for the run."""

from __future__ import annotations

import signal
import socket

import pytest

from moe_train.launch.ending import NOT_SAVED, Ending, Seen, judge
from moe_train.training import worker
from moe_train.training.worker_status import WorkerStatus


@pytest.mark.parametrize(
    ("code", "again"), [(worker.FAILED, True), (worker.WRONG_INPUT, False), (worker.BAD_NUMBERS, False), (-9, True)]
)
def test_which_failures_are_tried_again(code: int, again: bool) -> None:
    said: list[str] = []
    status = WorkerStatus(rank=1, pid=1, host="elsewhere", created=0.0, exit_code=code, error="why")
    ending = judge([status], Seen(), 1, None, None, True, said.append)
    assert (ending.code, ending.restart) == (code if code > 0 else 128 - code, again)
    assert said == [f"rank 1 failed with exit code {code}: why"]


@pytest.mark.parametrize(("processes", "code"), [(None, 1), (1, 0)])
def test_workers_elsewhere_must_report_their_end(processes: int | None, code: int) -> None:
    """DeepSpeed's launcher ends with 0 when a signal ended its pdsh. Of several commands each judges its own."""
    said: list[str] = []
    done = WorkerStatus(rank=0, pid=1, host="elsewhere", created=0.0, exit_code=0)
    lost = WorkerStatus(rank=1, pid=2, host="elsewhere", created=0.0)
    ending = judge([done, lost], Seen(), 0, None, processes, True, said.append)
    assert (ending.code, ending.restart) == (code, bool(code))
    assert ("rank 1 has not reported its end" in "".join(said)) == bool(code)


def test_workers_elsewhere_that_nobody_sees_are_not_missed() -> None:
    """Without a common disk."""
    assert judge([], Seen(), 0, None, None, True, pytest.fail).code == 0


def test_workers_elsewhere_that_a_stop_has_killed() -> None:
    said: list[str] = []
    lost = WorkerStatus(rank=1, pid=2, host="elsewhere", created=0.0)
    ending = judge([lost], Seen(), 0, 15, None, True, said.append)
    assert (ending.code, ending.restart) == (NOT_SAVED, False) and "killed before all had saved" in said[0]


def ended(code: int | None, rank: int = 0) -> WorkerStatus:
    return WorkerStatus(rank, pid=2**22 + 1, host=socket.gethostname(), created=0.0, exit_code=code)


@pytest.mark.parametrize("statuses", [[], [ended(0)], [ended(0), ended(None, 1)], [ended(None), ended(None, 1)]])
def test_a_stop_before_all_is_saved(statuses: list[WorkerStatus]) -> None:
    """A script that reads 143 relies on what is saved."""
    said: list[str] = []
    ending = judge(statuses, Seen(), 1, signal.SIGTERM, 2, True, said.append)
    assert ending == Ending(NOT_SAVED) and "--resume auto" in said[0]


def test_a_stop_when_all_is_saved() -> None:
    both = [ended(0), ended(0, 1)]
    assert judge(both, Seen(), 1, signal.SIGTERM, 2, True, pytest.fail) == Ending(143)
    # On another disk, seen by nobody.
    assert judge([], Seen(), 0, signal.SIGUSR1, None, True, pytest.fail) == Ending(138)


@pytest.mark.parametrize("code", [-signal.SIGTERM, 143, 130, NOT_SAVED])
def test_a_failure_never_says_that_all_is_saved(code: int) -> None:
    """Somebody has sent SIGTERM to the launcher, say."""
    for statuses in ([], [ended(None)], [ended(code)]):
        ending = judge(statuses, Seen(), code, None, 1, True, lambda text: None)
        assert ending.code == 1, statuses


@pytest.mark.parametrize(("code", "again"), [(-signal.SIGKILL, True), (3, False)])
def test_a_launcher_without_workers(code: int, again: bool) -> None:
    """Killed, or not able to run."""
    ending = judge([], Seen(), code, None, 2, True, lambda text: None)
    assert (ending.restart, ending.began) == (again, False)
