"""What one rank finds out for all, so that they cannot find different things."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")


def from_rank_0(work: Callable[[], T]) -> T:
    """What ``work`` returns on rank 0, on every rank; collective. It must be something that can be pickled.

    Errors: ValueError with the same text on every rank where it raised ValueError or OSError.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    answer: list[object] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = work()
        except (ValueError, OSError) as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise ValueError(answer[1])
    return cast(T, answer[0])
