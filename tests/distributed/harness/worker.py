"""One process of a pool: joins torch.distributed once, then runs the functions that it is sent."""

from __future__ import annotations

import datetime
import faulthandler
import importlib
import os
import pickle
import signal
import traceback
from multiprocessing.connection import Connection
from typing import Any

COLLECTIVE_SECONDS = 300.0


def serve(
    connection: Connection, rank: int, world_size: int, rendezvous: str, stacks: str, collective_seconds: float
) -> None:
    """Answers each (module, name, kwargs) with (True, result) or (False, traceback), until None arrives."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    # Where the stacks go when the parent asks what a process that hangs is doing.
    faulthandler.register(signal.SIGUSR1, open(stacks, "w"), all_threads=True)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
    )
    # Not earlier: the processes need not start at the same time.
    shorter = datetime.timedelta(seconds=collective_seconds)
    dist.distributed_c10d._set_pg_timeout(shorter)
    dist.distributed_c10d._get_default_store().set_timeout(shorter)
    connection.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            request = pickle.loads(connection.recv_bytes())
        except EOFError:  # the parent is gone
            os._exit(1)
        if request is None:
            os._exit(0)  # no clean-up of gloo: the peers may be gone already
        connection.send_bytes(pickle.dumps(_answer(*request)))


def _answer(module: str, name: str, kwargs: dict[str, Any]) -> tuple[bool, Any]:
    try:
        return True, getattr(importlib.import_module(module), name)(**kwargs)
    except BaseException:
        return False, traceback.format_exc()
