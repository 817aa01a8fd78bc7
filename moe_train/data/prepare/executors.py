"""Who does the tasks: this process, processes of this machine, or those of a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from typing import Any, NamedTuple, Protocol

from moe_train.data.prepare.part import PartFacts
from moe_train.data.prepare.runs import Runs
from moe_train.data.prepare.work import Context, Task, perform, tokenizer_of
from moe_train.data.tokenizers import Tokenizer

Result = tuple[Task, PartFacts | None]


class Counts(NamedTuple):
    documents: int
    tokens: int
    text_bytes: int
    read_bytes: int
    """Of text, used or not."""


class Executor(Protocol):
    def run(self, tasks: Iterator[Task]) -> Iterator[Result]:
        """Does tasks, several at a time, and yields each when it is done; takes only what it can begin at once."""
        ...

    def counts(self) -> Counts:
        """So far."""
        ...


class InProcess:
    def __init__(self, context: Context, tokenizer: Tokenizer, on_batch: Callable[[], None]) -> None:
        self._context, self._tokenizer, self._on_batch = context, tokenizer, on_batch
        self._counts = [0, 0, 0, 0]

    def run(self, tasks: Iterator[Task]) -> Iterator[Result]:
        with closing(Runs(self._context.folder, self._context.options.shard_tokens)) as runs:
            for task in tasks:
                yield task, perform(self._context, self._tokenizer, task, self._add, runs)

    def counts(self) -> Counts:
        return Counts(*self._counts)

    def _add(self, *values: int) -> None:
        for place, value in enumerate(values):
            self._counts[place] += value
        self._on_batch()


class Processes:
    """Workers that end with their parent, however it ends. OSError where one dies."""

    def __init__(self, context: Context, workers: int, on_batch: Callable[[], None]) -> None:
        self._context, self._workers, self._on_batch = context, workers, on_batch
        spawn = multiprocessing.get_context("spawn")
        self._counts = spawn.Array("q", 4)
        self._pool = ProcessPoolExecutor(workers, spawn, _begin_worker, (context, self._counts))

    def run(self, tasks: Iterator[Task]) -> Iterator[Result]:
        try:
            yield from in_flight(self._submit, tasks, self._workers + 1, self._on_batch)
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process died (out of memory, or killed); run the same command again, it goes on where it was"
            ) from error
        finally:
            # Not by shutdown alone, which would wait for what is begun.
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)

    def counts(self) -> Counts:
        return Counts(*self._counts[:])

    def _submit(self, task: Task) -> Future[Any]:
        try:
            return self._pool.submit(_work, task)
        except OSError as error:  # "handle is closed": how a pool answers that is just breaking
            raise BrokenProcessPool(str(error)) from error


def in_flight(
    submit: Callable[[Task], Future[Any]], tasks: Iterator[Task], count: int, on_wait: Callable[[], None]
) -> Iterator[Result]:
    """Keeps so many tasks begun; yields each when it is done."""
    begun: dict[Future[Any], Task] = {}
    more = True
    while more or begun:
        while more and len(begun) < count:
            task = next(tasks, None)
            if task is None:
                more = False
            else:
                begun[submit(task)] = task
        done, _ = wait(begun, timeout=0.5, return_when=FIRST_COMPLETED)
        on_wait()
        for future in done:
            yield begun.pop(future), future.result()


_worker: tuple[Context, Tokenizer, Any] | None = None
"""Of this process, once it is a worker."""


def _begin_worker(context: Context, counts: Any) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = (context, tokenizer_of(context.tokenizer), counts)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(task: Task) -> PartFacts | None:
    assert _worker is not None
    context, tokenizer, counts = _worker

    def add(*values: int) -> None:
        with counts.get_lock():
            for place, value in enumerate(values):
                counts[place] += value

    with suppress(KeyboardInterrupt):  # the parent ends its workers
        return perform(context, tokenizer, task, add)
    os._exit(130)
