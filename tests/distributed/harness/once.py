"""Work of one process per node while the others wait, as every rank of a pool sees it."""

from __future__ import annotations

import contextlib
import io
import os
import time
from dataclasses import dataclass
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
