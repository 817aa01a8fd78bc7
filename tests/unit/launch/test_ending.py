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
