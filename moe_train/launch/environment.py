"""The variables that launcher and workers are started with, on this machine and on others."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from moe_train.launch.hosts import is_one_line, merged_variables
from moe_train.launch.plan import LaunchOptions

DEEPSPEED_ENV = ".deepspeed_env"
_OURS = ("DS_ACCELERATOR", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "OMP_NUM_THREADS")
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL", "GLOO")
"""Beginnings of the names that DeepSpeed's launcher hands to the other hosts by itself, without regard to what shells
make of the values; and those of gloo."""


def worker_environment(
    options: LaunchOptions, base: Mapping[str, str], *, cpu: bool, cores: int | None = None
) -> dict[str, str]:
    """The environment of launcher and workers: ``base`` and what is missing in it. Where workers are started through
    ssh without what cannot be handed over."""
    environment = _one_liners(base) if options.by_ssh else dict(base)
    if cpu:
        environment["DS_ACCELERATOR"] = "cpu"
        # Also for code that asks torch: a rank must not find the one accelerator that there may be.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
        # glibc would give each large tensor's memory back to the system and fault it in again, page by page.
        environment.setdefault("MALLOC_MMAP_MAX_", "0")
        environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**33))
    cores = cores or available_cores()
    # Each worker would otherwise start as many threads as there are cores, and they would fight for them.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // options.largest_node)))
    environment.setdefault("PYTHONUNBUFFERED", "1")
    if options.launcher == "torchrun" and options.max_restarts:
        # torchrun would give restarted workers the store of those before them, whose addresses still stand in it:
        # gloo then connects to a process that is gone (seen in torch 2.13). So each start gets a store of its own.
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return environment


def _one_liners(base: Mapping[str, str]) -> dict[str, str]:
    """All of them, since DeepSpeed's accelerators add beginnings of their own; most would not have travelled."""
    left_out = [name for name, value in base.items() if not is_one_line(name, value)]
    if missed := sorted(name for name in left_out if name in _OURS or name.startswith(_EXPORTED)):
        print(
            f"moe-train: not handed to other hosts: {', '.join(map(ascii, missed))}; "
            "a variable needs a plain name and a value of one line",
            file=sys.stderr,
            flush=True,
        )
    return {name: value for name, value in base.items() if name not in left_out}


def remote_variables(environment: Mapping[str, str], folders: Iterable[Path]) -> dict[str, str]:
    """What is set on other hosts: the variables of ``.deepspeed_env`` (or what DS_ENV_FILE names) in the folders, and
    ours. Raises ValueError where a line of theirs is wrong."""
    name = environment.get("DS_ENV_FILE") or DEEPSPEED_ENV
    paths = list(dict.fromkeys(path for folder in folders if (path := folder / name).is_file()))
    if "DS_ENV_FILE" in environment and not paths:
        raise ValueError(f"DS_ENV_FILE={name}: there is no such file")
    lines = [
        (f"{path}, line {number}", line)
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    ]
    ours = {key: value for key, value in environment.items() if key in _OURS or key.startswith(_EXPORTED)}
    # Where the launcher finds this package the others do as well, if the folders are the same.
    ours["PYTHONPATH"] = os.pathsep.join(filter(None, [os.path.abspath("."), environment.get("PYTHONPATH", "")]))
    return merged_variables(lines, ours)


def ssh_options(environment: Mapping[str, str]) -> str:
    """What pdsh gives ssh besides what the user wants: never ask, and notice within two minutes that a host is gone."""
    ours = "-oBatchMode=yes -oServerAliveInterval=15 -oServerAliveCountMax=6"
    return " ".join(filter(None, [environment.get("PDSH_SSH_ARGS_APPEND", ""), ours]))


def available_cores() -> int:
    """Cores that this process may use (a container may be given fewer than there are)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
