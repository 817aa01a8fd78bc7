"""Processes that are started once and run many cases.

They are forked from a server that has imported torch, megatron-core and DeepSpeed already. A case that raises or hangs
on any rank costs its pool, which is started again for the next case; no case can take longer than its bound.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

from tests.distributed.harness import worker

_START_SECONDS = 300.0
_GRACE_SECONDS = 5.0
"""How long the other ranks may go on after one has failed."""
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",  # the tests are about gloo on CPU, everywhere
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(Path(__file__).resolve().parents[3]),
}


class CaseFailed(AssertionError):
    """A case raised on some rank, died, or took too long."""


class ProcessPool:
    """``world_size`` processes; started by the first case. ``collective_seconds``: what a collective may take."""

    def __init__(self, world_size: int, collective_seconds: float = worker.COLLECTIVE_SECONDS) -> None:
        self.world_size, self.collective_seconds = world_size, collective_seconds
        self._processes: list[Any] = []
        self._connections: list[connection.Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], timeout: float = 300.0, **kwargs: Any) -> list[Any]:
        """Calls a module-level function with the same arguments on every rank; returns what each rank returned."""
        if not self._processes:
            self._start()
        request = pickle.dumps((function.__module__, function.__qualname__, kwargs))
        for c in self._connections:
            c.send_bytes(request)
        return self._collect(timeout, function.__qualname__)

    def close(self) -> None:
        for c in self._connections:
            with contextlib.suppress(OSError):
                c.send_bytes(pickle.dumps(None))
        for process in self._processes:
            process.join(2)
        self._kill()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        self._folder = tempfile.TemporaryDirectory()
        folder = self._folder.name
        with _environment():
            context.set_forkserver_preload(["tests.distributed.harness.preload"])
            forkserver.ensure_running()
            for rank in range(self.world_size):
                ours, theirs = context.Pipe()
                files = f"{folder}/rendezvous", f"{folder}/{rank}"
                arguments = (theirs, rank, self.world_size, *files, self.collective_seconds)
                process = context.Process(target=worker.serve, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)
            self._collect(_START_SECONDS, "start")

    def _collect(self, timeout: float, what: str) -> list[Any]:
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        problems: list[str] = []
        waiting = dict(enumerate(self._connections))
        while waiting and (left := deadline - time.monotonic()) > 0:
            ready = connection.wait(list(waiting.values()), left)
            for rank in [r for r, c in waiting.items() if c in ready]:
                try:
                    ok, answer = pickle.loads(waiting.pop(rank).recv_bytes())
                except (EOFError, OSError):
                    ok, answer = False, "the process died"
                results[rank] = answer
                if not ok:
                    problems.append(f"--- rank {rank} of {self.world_size}:\n{answer}")
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if waiting and not problems:
            problems.append(f"{what} did not end within {timeout:.0f} s on rank(s) {sorted(waiting)}")
            problems += [self._stack(rank) for rank in waiting]
        if problems:
            self._kill()
            raise CaseFailed("\n".join(problems))
        return [results[rank] for rank in range(self.world_size)]

    def _stack(self, rank: int) -> str:
        """Where a process is that did not answer."""
        assert self._folder is not None
        os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        return f"--- rank {rank} is at:\n{Path(self._folder.name, str(rank)).read_text()}"

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join(10)
        for c in self._connections:
            c.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._connections = [], []


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What the fork server, once started, hands on to all processes."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
