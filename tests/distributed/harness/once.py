"""Work of one process per node while the others wait, as every rank of a pool sees it."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch.distributed as dist

from moe_train.parallel import once


@dataclass(frozen=True)
class Seen:
    worked: bool
    seconds: float
    error: str
    said: str


def slow_work(
    seconds: list[float], local_ranks: list[int], fails: int = -1, hangs: int = -1, late: float = 0.0
) -> Seen:
    """``seconds`` that the work takes on each rank that does it. ``fails``: the rank whose work raises then, ``hangs``:
    the rank whose signs of life stay away. ``late``: how long after the others the last rank comes."""
    rank = dist.get_rank()
    worked = False

    def work() -> None:
        nonlocal worked
        worked = True
        time.sleep(seconds[rank])
        if rank == fails:
            raise OSError(f"no space left for rank {rank}")

    if rank == dist.get_world_size() - 1:
        time.sleep(late)
    patches: list[Any] = [
        mock.patch.dict(os.environ, LOCAL_RANK=str(local_ranks[rank])),
        mock.patch.object(once, "_LOG_SECONDS", 1.0),
    ]
    if rank == hangs:
        patches.append(mock.patch.object(once._Call, "signs_of_life", lambda _: contextlib.nullcontext()))
    said, error, start = io.StringIO(), "", time.monotonic()
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(contextlib.redirect_stderr(said))
        try:
            once.once_per_node(work, "the index of a data set")
        except (ValueError, OSError, RuntimeError) as problem:
            error = f"{type(problem).__name__}: {problem}"
    return Seen(worked, time.monotonic() - start, error, said.getvalue())


def host_of_the_store(port: Connection, work: Callable[[], None]) -> None:
    """Rank 0 of two holds their store itself, does the work and ends as soon as it may."""
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    port.send(store.port)
    _join(store, 0)
    once.once_per_node(work, "the index of a data set")
    os._exit(0)


def guest_of_the_store(port: int, answer: Connection) -> None:
    """Rank 1 waits; sends the error that it met, or nothing."""
    error = ""
    _join(dist.TCPStore("127.0.0.1", port, 2, is_master=False), 1)
    try:
        once.once_per_node(lambda: None, "the index of a data set")
    except BaseException as problem:
        error = f"{type(problem).__name__}: {problem}"
    answer.send(error)
    os._exit(0)


def _join(store: dist.TCPStore, rank: int) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))


def work_for_a_while() -> None:
    time.sleep(2.0)


def die_at_work() -> None:
    time.sleep(1.0)
    os._exit(9)
