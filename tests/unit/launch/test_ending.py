"""What the end of a worker means for the run."""

from __future__ import annotations

import pytest

from moe_train.launch.ending import Seen, judge
from moe_train.training import worker
from moe_train.training.worker_status import WorkerStatus


@pytest.mark.parametrize(
    ("code", "again"), [(worker.FAILED, True), (worker.WRONG_INPUT, False), (worker.BAD_NUMBERS, False), (-9, True)]
)
def test_which_failures_are_tried_again(code: int, again: bool) -> None:
    said: list[str] = []
    status = WorkerStatus(rank=1, pid=1, host="elsewhere", created=0.0, exit_code=code, error="why")
    ending = judge([status], Seen(), 1, None, None, True, said.append)
    assert (ending.code, ending.restart) == (code, again)
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
    assert (ending.code, ending.restart) == (143, False) and "killed before all had saved" in said[0]
