"""Process pools shared by all tests of a folder that need processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.distributed.harness.pool import ProcessPool

POOLS = pytest.StashKey[dict[int, ProcessPool]]()


@pytest.fixture(scope="session")
def processes(pytestconfig: pytest.Config) -> Callable[[int], ProcessPool]:
    """``processes(n)``: the pool of n processes, started when it is first asked for."""
    pools = pytestconfig.stash.setdefault(POOLS, {})
    return lambda size: pools.setdefault(size, ProcessPool(size))


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ends the processes after the last test of a folder: gloo's threads poll, which takes time from other tests."""
    if nextitem is None or nextitem.path.parent != item.path.parent:
        pools = item.config.stash.get(POOLS, {})
        for pool in pools.values():
            pool.close()
        pools.clear()
