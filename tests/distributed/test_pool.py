"""The pool itself: no case can hang the suite, and the next one finds working processes."""

from __future__ import annotations

import time

import pytest

from tests.distributed.harness import bits
from tests.distributed.harness.expected import Processes
from tests.distributed.harness.pool import CaseFailed


@pytest.mark.parametrize(
    ("how", "message"), [("raise", "rank 1 of 2:\n(.|\n)*RuntimeError: on purpose"), ("exit", "the process died")]
)
def test_a_rank_that_fails_is_named_and_the_pool_starts_again(processes: Processes, how: str, message: str) -> None:
    pool = processes(2)
    start = time.monotonic()
    with pytest.raises(CaseFailed, match=message):
        pool.run(bits.fail_on, rank=1, how=how)
    assert time.monotonic() - start < 60
    assert pool.run(bits.fail_on, rank=1, how="nothing") == [0, 1]


def test_a_case_that_hangs_is_ended_and_says_where(processes: Processes) -> None:
    pool = processes(2)
    with pytest.raises(CaseFailed, match=r"did not end within 1 s on rank\(s\) \[0, 1\](.|\n)*in wait_for_ever"):
        pool.run(bits.wait_for_ever, timeout=1.0)
    assert pool.run(bits.fail_on, rank=0, how="nothing") == [0, 1]
