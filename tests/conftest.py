"""Process pools shared by all tests of a folder that need processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.harness.pool import ProcessPool

POOLS = pytest.StashKey[dict[int, ProcessPool]]()


@pytest.fixture(scope="session")
def processes(pytestconfig: pytest.Config) -> Callable[[int], ProcessPool]:
    """``processes(n)``: the pool of n processes, started when it is first asked for."""
    pools = pytestconfig.stash.setdefault(POOLS, {})
    return lambda size: pools.setdefault(size, ProcessPool(size))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of a file stay together, and all that use pools of processes: gloo polls, so that two such files at a time
    take far longer than one after the other."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "tests/distributed" if file.startswith("tests/distributed/") else file

    return Scheduling(config, log)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ends the processes after the last test of a folder: gloo's threads poll, which takes time from other tests."""
    if nextitem is None or nextitem.path.parent != item.path.parent:
        pools = item.config.stash.get(POOLS, {})
        for pool in pools.values():
            pool.close()
        pools.clear()
