"""Process pools shared by all tests of a session that need processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.harness.pool import ProcessPool


@pytest.fixture(scope="session")
def processes() -> Iterator[Callable[[int], ProcessPool]]:
    """``processes(n)``: the pool of n processes, started when it is first asked for."""
    pools: dict[int, ProcessPool] = {}
    yield lambda size: pools.setdefault(size, ProcessPool(size))
    for pool in pools.values():
        pool.close()
