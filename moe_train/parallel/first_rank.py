"""What one rank finds out for all, so that they cannot find different things."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

from moe_train.parallel.passing import PassingError, may_pass

T = TypeVar("T")


def from_rank_0(work: Callable[[], T]) -> T:
    """What ``work`` returns on rank 0, on every rank; collective. It must be something that can be pickled.

    Errors: where it raised ValueError or OSError, one with the same text on every rank, however many there are:
    PassingError where another start may go better, else ValueError.
    """
    several = dist.is_initialized() and dist.get_world_size() > 1
    answer: list[object] = [None, None, False]
    if not several or dist.get_rank() == 0:
        try:
            answer[0] = work()
        except (ValueError, OSError) as error:
            answer[1:] = str(error), may_pass(error)
    if several:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise (PassingError if answer[2] else ValueError)(answer[1])
    return cast(T, answer[0])
