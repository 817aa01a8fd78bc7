"""Work that one process of each node does while the others wait."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch.distributed as dist


def once_per_node(work: Callable[[], None]) -> None:
    """Runs `work` in the process with local rank 0 of every node; returns everywhere when all have finished.

    So nothing is assumed about which disks the nodes share. Must be called by all processes.
    Errors: the error of `work` in the process where it happened, ValueError with its text in all others.
    """
    error: Exception | None = None
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        try:
            work()
        except Exception as problem:  # whatever it is: the others wait for an answer
            error = problem
    if dist.is_initialized() and dist.get_world_size() > 1:
        texts: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(texts, None if error is None else str(error))
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
        if failed and error is None:
            raise ValueError("; ".join(failed))
    if error is not None:
        raise error
