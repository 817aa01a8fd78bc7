"""Whether all processes see the same folder."""

from __future__ import annotations

import socket
import time
import uuid
from pathlib import Path

import torch.distributed as dist

VISIBLE_WITHIN = 10.0
"""Seconds that a network file system may take to show something new to other machines."""


def blind_hosts(folder: Path) -> list[str]:
    """Names of the machines that do not see what rank 0 writes into the folder; collective, every rank gets the same.

    Empty also where rank 0 cannot write there: that is another matter, and who writes next will say it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return []
    token: list[str | None] = [None]
    path = folder / f".seen.{uuid.uuid4().hex}"
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.touch()
            token = [path.name]
        except OSError:
            pass
    dist.broadcast_object_list(token, src=0)
    if token[0] is None:
        return []
    try:
        return hosts_without(folder / token[0])
    finally:
        if dist.get_rank() == 0:
            path.unlink(missing_ok=True)


def hosts_without(path: Path) -> list[str]:
    """Names of the machines where this path does not come into sight; collective."""
    deadline = time.monotonic() + VISIBLE_WITHIN
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    mine = None if path.exists() else socket.gethostname()
    if dist.get_world_size() == 1:
        return [] if mine is None else [mine]
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, mine)
    return sorted({name for name in names if name is not None})
