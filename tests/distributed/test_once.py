"""One process of a node works, the others wait for longer than a collective may take."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator

import pytest

from tests.distributed.harness.once import (
    die_at_work,
    guest_of_the_store,
    host_of_the_store,
    slow_work,
    work_for_a_while,
)
from tests.distributed.harness.pool import ProcessPool

TIMEOUT = 3.0
LONG = 2.5 * TIMEOUT


@pytest.fixture(scope="module")
def pair() -> Iterator[ProcessPool]:
    """Two processes whose collectives end after three seconds."""
    pool = ProcessPool(2, collective_seconds=TIMEOUT)
    yield pool
    pool.close()


@pytest.mark.parametrize("local_ranks", [[0, 1], pytest.param([0, 0], marks=pytest.mark.slow)])
def test_waiting_outlasts_the_timeout_of_collectives(pair: ProcessPool, local_ranks: list[int]) -> None:
    """On one node, and on two of which one has little to do."""
    for slow in (0, 1) if local_ranks == [0, 0] else (0,):
        seconds = [LONG if rank == slow else 0.0 for rank in range(2)]
        seen = pair.run(slow_work, seconds=seconds, local_ranks=local_ranks)
        assert [found.error for found in seen] == ["", ""]
        assert [found.worked for found in seen] == [local == 0 for local in local_ranks]
        assert all(found.seconds >= LONG for found in seen), "a process went on before all had finished"
        lines = seen[1 - slow].said.splitlines()
        assert len(lines) >= 2 and not seen[slow].said
        assert all(f"rank {1 - slow} has waited" in line and "for the index of a data set" in line for line in lines)


def test_a_failure_reaches_the_others_at_once(pair: ProcessPool) -> None:
    """With its text, not as a timeout; afterwards the next call is as any other."""
    for local_ranks, fails, late in (([0, 1], 0, 0.0), ([0, 0], 1, 0.0), ([0, 1], 0, 1.0)):
        seen = pair.run(slow_work, seconds=[0.5, 0.5], local_ranks=local_ranks, fails=fails, late=late)
        assert seen[fails].error == f"OSError: no space left for rank {fails}"
        assert seen[1 - fails].error == f"ValueError: rank {fails}: no space left for rank {fails}"
    again = pair.run(slow_work, seconds=[0.0, 0.0], local_ranks=[0, 1])
    assert [(found.worked, found.error) for found in again] == [(True, ""), (False, "")]


@pytest.mark.slow
def test_a_process_that_is_gone_is_not_waited_for_without_end(pair: ProcessPool) -> None:
    seen = pair.run(slow_work, seconds=[3 * TIMEOUT, 0.0], local_ranks=[0, 1], hangs=0)
    assert "RuntimeError: rank 1 waits for the index of a data set" in seen[1].error, "it waited to the end"


def guest_after(work: Callable[[], None]) -> tuple[int | None, str]:
    """Two processes, the first of which holds the store and ends right after its work: its exit code, and the error of
    the second."""
    context = multiprocessing.get_context("forkserver")
    (port, its_port), (answer, its_answer) = context.Pipe(duplex=False), context.Pipe(duplex=False)
    host = context.Process(target=host_of_the_store, args=(its_port, work), daemon=True)
    host.start()
    assert port.poll(60)
    guest = context.Process(target=guest_of_the_store, args=(port.recv(), its_answer), daemon=True)
    guest.start()
    try:
        assert answer.poll(60)
        error = answer.recv()
        host.join(30)
        return host.exitcode, error
    finally:
        for process in (host, guest):
            process.kill()
            process.join()


def test_the_host_of_the_store_may_end_right_afterwards() -> None:
    """As a process does that is refused next: the others have looked at the store once more by then."""
    assert guest_after(work_for_a_while) == (0, "")


def test_the_host_of_the_store_dies_at_work() -> None:
    """One clear line, and no stack of C++."""
    code, error = guest_after(die_at_work)
    assert code == 9 and error.startswith(
        "RuntimeError: rank 1 waits for the index of a data set, but the process that"
    )
    assert "\n" not in error and "does not answer" in error
