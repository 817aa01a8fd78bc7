"""A disk that is away for a moment on one rank: all ranks agree that another start may go better."""

from __future__ import annotations

import errno
import os

import pytest

from tests.distributed.harness.away import WAYS, seen
from tests.distributed.harness.expected import Processes


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("number", "passes"), [(errno.ESTALE, True), (errno.EIO, True), (errno.ENOENT, False)])
def test_all_ranks_judge_alike(processes: Processes, size: int, number: int, passes: bool) -> None:
    error = OSError(number, os.strerror(number))
    for found in processes(size).run(seen, errors=[error, None][:size]):
        assert tuple(found) == WAYS
        for passing, text in found.values():
            assert passing == passes and os.strerror(number) in text


def test_what_is_wrong_on_any_rank_counts(processes: Processes) -> None:
    """Another start would meet it again."""
    stale, damaged = OSError(errno.ESTALE, "stale"), ValueError("damaged")
    for errors in ([stale, damaged], [damaged, stale]):
        found = processes(2).run(seen, errors=errors)
        assert [one["load"] for one in found] == [(False, "damaged")] * 2


def test_an_error_of_the_program_is_no_wrong_input(processes: Processes) -> None:
    """Where another rank meets it first: the launch is judged by whoever ends first."""
    found = processes(2).run(seen, errors=[None, RuntimeError("broken")], ways=["once"])
    assert found[0]["once"] == (True, "rank 1: broken")
