"""Work that one process of each node does while the others wait."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from moe_train.parallel.passing import PassingError, may_pass

_POLL_SECONDS = 0.05
_SLOWEST_POLL_SECONDS = 1.0
_BEAT_SECONDS = 10.0
"""How often who works says that it is alive; less where the timeout of the group is short."""
_LOG_SECONDS = 60.0
_FAREWELL_SECONDS = 10.0


def once_per_node(work: Callable[[], None], what: str = "the work of local rank 0") -> None:
    """Runs `work` in the process with local rank 0 of every node; returns everywhere when all have finished.

    So nothing is assumed about which disks the nodes share. Must be called by all processes. The work may take longer
    than a collective may: nobody waits in one. Processes look at the store that torch.distributed began with, and say
    now and then that they wait, and for what (`what`). They give up when, for as long as a collective may take, nobody
    has arrived, finished or given a sign of life.
    Whoever returns may end at once, even the process that holds the store.
    Errors: the error of `work` in the process where it happened, as soon as it happens one with its text in all others
    (ValueError, or PassingError where another start may go better); RuntimeError where a process is gone.
    """
    builds = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if builds:
            work()
        return
    call = _Call(dist.get_rank(), dist.get_world_size(), what)
    call.arrive()
    if builds:
        try:
            with call.signs_of_life():
                work()
        except Exception as problem:  # whatever it is: the others wait for an answer
            with suppress(RuntimeError):  # the store is gone, and with it those who could be told
                wrong = isinstance(problem, (ValueError, OSError)) and not may_pass(problem)
                call.fail(str(problem) or type(problem).__name__, wrong)
            raise
    call.finish()
    call.wait()


@dataclass
class _Call:
    """One call of `once_per_node` on all processes: counters in their common store."""

    rank: int
    world_size: int
    what: str

    def __post_init__(self) -> None:
        # The only one that all processes have, whoever started them; every store answers without the other processes.
        self.store = _get_default_store()
        self.seconds: float = self.store.timeout.total_seconds()  # type: ignore[attr-defined]  # not in the stubs

    def arrive(self) -> None:
        # Each process takes part in each call once, so tickets of one call are neighbours.
        with self._answered():
            ticket = self.store.add("once/tickets", 1)
        self.name = f"once/{(ticket - 1) // self.world_size}"
        self.add("signs", 1)

    def add(self, counter: str, amount: int) -> int:
        with self._answered():
            return int(self.store.add(f"{self.name}/{counter}", amount))

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Around each use of the store. RuntimeError where nobody holds it any more."""
        try:
            yield
        except dist.DistError as error:
            reason = str(error).partition("\n")[0]  # below is a stack of C++
            raise RuntimeError(
                f"rank {self.rank} waits for {self.what}, but the process that holds the common store of all processes "
                f"does not answer: it has ended or cannot be reached, and its own messages say why ({reason})"
            ) from None

    @contextmanager
    def signs_of_life(self) -> Iterator[None]:
        """A thread says that this process lives while the body runs."""
        over = threading.Event()

        def beat() -> None:
            with suppress(RuntimeError):  # the process itself meets it when its work is done
                while not over.wait(min(_BEAT_SECONDS, self.seconds / 5)):
                    self.add("signs", 1)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def fail(self, text: str, wrong: bool) -> None:
        """wrong: another start would meet the same."""
        with self._answered():
            self.store.set(f"{self.name}/error/{self.rank}", text)
        self.add("wrong", int(wrong))
        self.add("failed", 1)  # last: who sees it asks for the rest
        self._leave()

    def finish(self) -> None:
        self.add("finished", 1)
        self.add("signs", 1)

    def wait(self) -> None:
        """Until all processes have finished, or one has failed."""
        start = seen = said = time.monotonic()
        signs, pause = -1, _POLL_SECONDS
        while (finished := self.add("finished", 0)) < self.world_size:
            if self.add("failed", 0):
                text, wrong = "; ".join(self._errors()), self.add("wrong", 0)
                self._leave()
                raise (ValueError if wrong else PassingError)(text)
            now = time.monotonic()
            if (found := self.add("signs", 0)) != signs:
                signs, seen = found, now
            elif now - seen > self.seconds:
                raise RuntimeError(
                    f"rank {self.rank} waits for {self.what}, but for {now - seen:.0f} s none of the "
                    f"{self.world_size - finished} processes that are still missing has given a sign of life"
                )
            if now - said > _LOG_SECONDS and int(os.environ.get("LOCAL_RANK", "0")) <= 1:
                said = now
                print(
                    f"rank {self.rank} has waited {now - start:.0f} s for {self.what} "
                    f"({finished} of {self.world_size} processes have it)",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(pause)
            pause = min(1.2 * pause, _SLOWEST_POLL_SECONDS)
        self._leave()

    def _errors(self) -> list[str]:
        texts = ((rank, f"{self.name}/error/{rank}") for rank in range(self.world_size))
        with self._answered():
            return [f"rank {rank}: {self.store.get(key).decode()}" for rank, key in texts if self.store.check([key])]

    def _leave(self) -> None:
        """The process of rank 0 may hold the store: it goes when all others know how it ended, or soon after."""
        known, deadline = self.add("known", 1), time.monotonic() + _FAREWELL_SECONDS
        while self.rank == 0 and known < self.world_size and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            known = self.add("known", 0)
