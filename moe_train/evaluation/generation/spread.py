"""Prompts over data-parallel ranks, and their results back in order."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moe_train.parallel.groups import Groups

R = TypeVar("R")


def batches_of_rank(prompts: int, batch_size: int, groups: Groups) -> list[list[int]]:
    """Numbers of the prompts of each batch of this rank; as many batches on every rank, of which some may be empty."""
    together = batch_size * groups.data_size
    starts = range(0, prompts, together)
    return [list(range(start + groups.data_rank, min(start + together, prompts), groups.data_size)) for start in starts]


def go_on(groups: Groups, active: bool, beyond: bool, problem: BaseException | None) -> tuple[bool, bool]:
    """Whether any rank is ``active`` (has a sequence that goes on), and whether any is ``beyond`` the trained length.
    Every rank must call it before each pass.

    Raises ``problem`` on the rank that has one, and RuntimeError on all others.
    """
    if groups.data_size > 1:
        flags = torch.tensor([active, beyond, problem is not None], dtype=torch.int64, device=groups.device)
        active, beyond, failed = (count > 0 for count in groups.sum_over_data(flags).tolist())
    else:
        failed = False
    if problem is not None:
        raise problem
    if failed:
        raise RuntimeError("another rank has failed while generating; its own message says why")
    return active, beyond


def gather(mine: dict[int, R], groups: Groups) -> list[R]:
    """Results by number of the prompt from all ranks, in order, on every rank."""
    parts: list[Any] = [mine]
    if groups.data_size > 1:
        parts = [None] * groups.data_size
        dist.all_gather_object(parts, mine, group=groups.data)
    whole: dict[int, R] = {number: result for part in parts for number, result in part.items()}
    return [whole[number] for number in sorted(whole)]
