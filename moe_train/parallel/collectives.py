"""Which collective this process has entered last, for whoever asks why it does not go on."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

_NAMES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "monitored_barrier",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "send",
)


class LastCollective:
    """Name and number of the collective that was entered last, and whether its call has returned.

    On CUDA a call returns before the collective is done: the one that hangs is this one or an earlier one.
    """

    def __init__(self) -> None:
        self.name = ""
        self.number = 0
        self.entered = 0.0
        """Seconds since the epoch."""
        self.inside = False

    def watch(self) -> None:
        """Has every later call of torch.distributed's collectives noted, by whomever; for the life of the process."""
        # Here, since processes say that they are there before they import torch, which takes seconds.
        import torch.distributed as dist

        for name in _NAMES:
            setattr(dist, name, self._noted(name, getattr(dist, name)))

    def _noted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.name, self.number, self.entered, self.inside = name, self.number + 1, time.time(), True
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False

        return noted
