"""The command that starts the workers, for each launcher. Pure functions; supervise.py runs what they return."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

WORKER = "moe_train.training"
DEFAULT_PORT = 29500
DEEPSPEED_ENV = ".deepspeed_env"
Launcher = Literal["deepspeed", "torchrun", "none"]


@dataclass(frozen=True)
class LaunchOptions:
    launcher: Launcher = "deepspeed"
    processes: int = 1
    """Worker processes on each node (with a hostfile at most; its slots decide otherwise)."""
    hostfile: Path | None = None
    """Hosts and their slots; DeepSpeed starts the workers there through ssh."""
    no_ssh: bool = False
    """This command starts the workers of one node only; the same command runs on each node."""
    nodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None
    max_restarts: int = 0
    """Times that a run which fails is started again."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"--processes must be at least 1, got {self.processes}")
        if self.max_restarts < 0:
            raise ValueError(f"--max-restarts must not be negative, got {self.max_restarts}")
        if self.max_restarts and self.no_ssh and self.nodes > 1 and self.launcher != "torchrun":
            raise ValueError(
                "--max-restarts with --no-ssh needs --launcher torchrun: the commands of several nodes must agree on a "
                "restart, which torchrun's agents do"
            )
        if not 0 <= self.node_rank < self.nodes:
            raise ValueError(f"--node-rank must lie between 0 and --num-nodes - 1 = {self.nodes - 1}")
        if self.launcher == "none" and (self.processes > 1 or self.nodes > 1 or self.hostfile):
            raise ValueError("--launcher none runs one process; use deepspeed or torchrun for more")
        if self.launcher == "torchrun" and self.hostfile:
            raise ValueError("--hostfile needs --launcher deepspeed; torchrun is started on each node")
        if self.nodes > 1 and not self.no_ssh and not self.hostfile:
            raise ValueError("--num-nodes needs --no-ssh (a command on each) or --hostfile (one command for all)")
        if self.no_ssh and self.nodes > 1 and not self.master_addr:
            raise ValueError("--no-ssh needs --master-addr, the address of node 0, the same on every node")
        if self.hostfile is not None and not self.hostfile.is_file():
            raise ValueError(f"--hostfile {self.hostfile}: there is no such file")

    @property
    def world_size(self) -> int:
        if self.hostfile is None:
            return self.nodes * self.processes
        slots = list(read_hostfile(self.hostfile).values())
        return sum(slots[: self.nodes] if self.nodes > 1 else slots)

    @property
    def largest_node(self) -> int:
        """Workers on the node that has most of them."""
        return self.processes if self.hostfile is None else max(1, *read_hostfile(self.hostfile).values())

    @property
    def local_processes(self) -> int | None:
        """Workers that start on this machine; None where DeepSpeed starts them through ssh."""
        return None if self.hostfile is not None and not self.no_ssh else self.processes


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> slots, from lines such as ``worker-0 slots=8``."""
    hosts: dict[str, int] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", line)
        if match is None:
            raise ValueError(f"{path}: a line reads `host slots=N`, got {line!r}")
        if match[1] in hosts:
            raise ValueError(f"{path}: {match[1]} is named twice")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ValueError(f"{path}: names no host")
    return hosts


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(
    options: LaunchOptions,
    worker_arguments: list[str],
    *,
    scratch: Path,
    environment: Mapping[str, str] = os.environ,
    module: str = WORKER,
) -> list[str]:
    """The command line of the launcher. ``scratch`` is a folder for a generated hostfile."""
    several = options.nodes > 1 or options.hostfile is not None
    port = options.master_port or (DEFAULT_PORT if several else free_port())
    if options.launcher == "torchrun":
        return [*_torchrun(options, port), "--module", module, *worker_arguments]
    assert options.launcher == "deepspeed", options.launcher
    line = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error", "--master_port", str(port)]
    if options.no_ssh and several:
        hostfile = options.hostfile or _hostfile(options, scratch)
        line += ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(options.node_rank)]
        line += ["--num_nodes", str(options.nodes), "--num_accelerators", str(options.processes)]
    elif options.hostfile is not None:
        line += ["--hostfile", str(options.hostfile)]
        if options.nodes > 1:
            line += ["--num_nodes", str(options.nodes)]
    else:
        # An empty name: without one DeepSpeed takes a hostfile of its own default place if there is one.
        line += ["--hostfile", "", *_local_devices(options.processes, environment)]
    if options.master_addr:
        line += ["--master_addr", options.master_addr]
    return [*line, "--module", module, *worker_arguments]


def _torchrun(options: LaunchOptions, port: int) -> list[str]:
    address = options.master_addr or "127.0.0.1"
    line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(options.nodes)]
    line += ["--nproc-per-node", str(options.processes), "--max-restarts", str(options.max_restarts)]
    if not options.max_restarts:
        return [*line, *("--node-rank", str(options.node_rank), "--master-addr", address, "--master-port", str(port))]
    # Only agents that meet anew can restart together; node 0 is where they meet.
    return [
        *line,
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:{port}", "--rdzv-id", f"moe-train-{port}"),
        *("--rdzv-conf", f"is_host={'true' if options.node_rank == 0 else 'false'}"),
    ]


def _hostfile(options: LaunchOptions, scratch: Path) -> Path:
    """DeepSpeed counts nodes by a hostfile, also where it logs in nowhere."""
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / f"hostfile.node_{options.node_rank}"
    lines = [f"node-{node} slots={options.processes}\n" for node in range(options.nodes)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _local_devices(processes: int, environment: Mapping[str, str]) -> list[str]:
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if not visible or environment.get("DS_ACCELERATOR") == "cpu":
        return ["--num_accelerators", str(processes)]
    # DeepSpeed ignores CUDA_VISIBLE_DEVICES together with --num_accelerators and would take the first devices.
    ids = [part.strip() for part in visible.split(",")]
    if not all(part.isdigit() for part in ids):
        raise ValueError(f"CUDA_VISIBLE_DEVICES={visible}: DeepSpeed's launcher needs numbers; use --launcher torchrun")
    if processes > len(ids):
        raise ValueError(f"--processes {processes}, but CUDA_VISIBLE_DEVICES={visible} names {len(ids)}")
    return ["--include", "localhost:" + ",".join(ids[:processes])]


def worker_environment(
    options: LaunchOptions, base: Mapping[str, str], *, cpu: bool, cores: int | None = None
) -> dict[str, str]:
    """The environment of launcher and workers: ``base`` and what is missing in it."""
    environment = dict(base)
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
    return environment


def remote_environment(environment: Mapping[str, str], folders: Iterable[Path]) -> str:
    """Content of the file of variables that DeepSpeed's launcher sets on other hosts: those of ``.deepspeed_env`` in
    the folders, then ours."""
    lines = [line for folder in folders if (path := folder / DEEPSPEED_ENV).is_file() for line in _lines(path)]
    ours = ("DS_ACCELERATOR", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "OMP_NUM_THREADS", "PYTHONUNBUFFERED")
    named = {line.split("=", 1)[0] for line in lines}
    lines += [f"{name}={environment[name]}" for name in ours if name in environment and name not in named]
    return "".join(f"{line}\n" for line in lines)


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if "=" in line]


def available_cores() -> int:
    """Cores that this process may use (a container may be given fewer than there are)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
