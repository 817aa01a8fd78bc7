"""Errors of one rank, as every rank of a pool sees them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from moe_train.checkpoint import loading
from moe_train.parallel.first_rank import from_rank_0
from moe_train.parallel.once import once_per_node
from moe_train.parallel.passing import may_pass

WAYS = ("rank 0", "load", "once")
"""To work together."""


def seen(errors: list[Exception | None], ways: Sequence[str] = WAYS) -> dict[str, tuple[bool, str]]:
    """``errors``: what each rank's own part raises. For each way: whether another start may go better by what this rank
    raised, and its text."""
    error = errors[dist.get_rank()]

    def work(*_: object) -> None:
        if error is not None:
            raise error

    def load() -> None:
        with mock.patch.object(loading, "_load", work):
            loading.load(Path("step_3"), [], {})

    def once() -> None:
        with mock.patch.dict(os.environ, LOCAL_RANK=str(int(error is None))):
            once_per_node(work)

    calls = {"rank 0": lambda: from_rank_0(work), "load": load, "once": once}
    return {way: _raised(calls[way]) for way in ways}


def _raised(way: Callable[[], None]) -> tuple[bool, str]:
    try:
        way()
    except Exception as error:
        return may_pass(error), str(error)
    return False, ""
