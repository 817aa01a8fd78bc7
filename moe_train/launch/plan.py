"""The command that starts the workers, for each launcher. Pure functions; supervise.py runs what they return."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from moe_train.launch.hosts import (
    THIS_MACHINE,
    Slots,
    check_address,
    check_plain,
    choose,
    include_text,
    read_hostfile,
)

WORKER = "moe_train.training"
DEFAULT_PORT = 29500
Launcher = Literal["deepspeed", "torchrun", "srun", "none"]


@dataclass(frozen=True)
class LaunchOptions:
    launcher: Launcher = "deepspeed"
    processes: int = 1
    """Worker processes on each node; with a hostfile its slots decide."""
    hostfile: Path | None = None
    """Hosts and their slots; DeepSpeed starts the workers there through ssh."""
    include: str = ""
    """Of the hostfile, only these: ``host`` or ``host:0,2``, several joined by ``@``."""
    exclude: str = ""
    """Likewise, all but these."""
    no_ssh: bool = False
    """This command starts the workers of one node only; the same command runs on each node."""
    nodes: int = 1
    """With a hostfile its first so many hosts; 1: all."""
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None
    max_restarts: int = 0
    """Times that a run which fails is started again."""
    tasks: int = 1
    """Tasks of the Slurm step (launcher srun)."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"--processes must be at least 1, got {self.processes}")
        if self.nodes < 1:
            raise ValueError(f"--num-nodes must be at least 1, got {self.nodes}")
        if self.max_restarts < 0:
            raise ValueError(f"--max-restarts must not be negative, got {self.max_restarts}")
        if self.master_port is not None and not 0 < self.master_port < 65536:
            raise ValueError(f"--master-port must lie between 1 and 65535, got {self.master_port}")
        if self.master_addr:
            check_address(self.master_addr)
        if self.launcher in ("none", "srun") and (self.processes > 1 or self.nodes > 1 or self.hostfile or self.no_ssh):
            what = "runs one process" if self.launcher == "none" else "takes everything about nodes from Slurm"
            raise ValueError(f"--launcher {self.launcher} {what}; use deepspeed or torchrun for more")
        if self.launcher == "srun" and self.max_restarts:
            raise ValueError("--max-restarts: with --launcher srun the batch system starts a job again")
        if self.launcher == "torchrun" and self.hostfile:
            raise ValueError("--hostfile needs --launcher deepspeed; torchrun is started on each node")
        if self.hostfile is not None and not self.hostfile.is_file():
            raise ValueError(f"--hostfile {self.hostfile}: there is no such file")
        if (self.include or self.exclude) and self.hostfile is None:
            raise ValueError("--include and --exclude choose among the hosts of a --hostfile")
        if self.nodes > 1 and not self.no_ssh and not self.hostfile:
            raise ValueError("--num-nodes needs --no-ssh (a command on each) or --hostfile (one command for all)")
        if not 0 <= self.node_rank < self.node_count:
            raise ValueError(f"--node-rank must lie between 0 and {self.node_count - 1}, got {self.node_rank}")
        if self.node_rank and not self.no_ssh:
            raise ValueError("--node-rank needs --no-ssh: else one command starts all nodes")
        if self.no_ssh and self.node_count > 1 and not self.address:
            raise ValueError("--no-ssh needs --master-addr, the address of node 0, the same on every node")
        if self.max_restarts and self.no_ssh and self.node_count > 1 and self.launcher != "torchrun":
            raise ValueError(
                "--max-restarts with --no-ssh needs --launcher torchrun: the commands of several nodes must agree on a "
                "restart, which torchrun's agents do"
            )

    @cached_property
    def slots(self) -> Slots:
        """Of the hostfile, what is used; empty without one."""
        if self.hostfile is None:
            return {}
        return choose(read_hostfile(self.hostfile), self.include, self.exclude, self.nodes if self.nodes > 1 else 0)

    @property
    def node_count(self) -> int:
        return len(self.slots) or self.nodes

    @property
    def address(self) -> str | None:
        """Of node 0, as far as it is known."""
        return self.master_addr or (next(iter(self.slots)) if self.slots and self.no_ssh else None)

    @property
    def by_ssh(self) -> bool:
        """Whether workers are started on other machines by this command."""
        return bool(self.slots) and not self.no_ssh and not all(host in THIS_MACHINE for host in self.slots)

    @property
    def world_size(self) -> int:
        if self.launcher == "srun":
            return self.tasks
        return sum(map(len, self.slots.values())) if self.slots else self.nodes * self.processes

    @property
    def largest_node(self) -> int:
        """Workers on the node that has most of them."""
        return max(map(len, self.slots.values())) if self.slots else self.processes

    @property
    def local_processes(self) -> int | None:
        """Workers that start on this machine; None where DeepSpeed starts them through ssh."""
        if self.by_ssh:
            return None
        return len(list(self.slots.values())[self.node_rank]) if self.slots else self.processes


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def own_address(other: str, port: int) -> str | None:
    """This machine's address on the way to another one; None where the other's name is not known. Sends nothing."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(other, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def command(
    options: LaunchOptions,
    worker_arguments: list[str],
    *,
    scratch: Path,
    environment: Mapping[str, str] = os.environ,
    module: str = WORKER,
) -> list[str]:
    """The command line of the launcher. ``scratch`` is a folder of this launch, for a generated hostfile."""
    several = options.node_count > 1 or options.by_ssh
    port = options.master_port or (DEFAULT_PORT if several else free_port())
    if options.launcher == "torchrun":
        return [*_torchrun(options, port), "--module", module, *worker_arguments]
    assert options.launcher == "deepspeed", options.launcher
    line = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error", "--master_port", str(port)]
    if options.slots and several:
        # Without force_multi a single host that is left over would be taken for this machine.
        how = ["--no_ssh", "--node_rank", str(options.node_rank)] if options.no_ssh else ["--force_multi"]
        line += ["--hostfile", str(_resolved(options)), "--include", include_text(options.slots), *how]
    elif options.no_ssh and several:
        line += ["--hostfile", str(_hostfile(options, scratch)), "--no_ssh", "--node_rank", str(options.node_rank)]
        line += ["--num_nodes", str(options.nodes), "--num_accelerators", str(options.processes)]
    else:
        # An empty name: without one DeepSpeed takes a hostfile of its own default place if there is one.
        chosen = next(iter(options.slots.values()), None)
        line += ["--hostfile", "", *_local_devices(chosen or tuple(range(options.processes)), environment)]
    if options.address:
        line += ["--master_addr", options.address]
    if options.by_ssh:
        check_plain([sys.executable], "the interpreter's path")
        check_plain([os.path.abspath(".")], "the working folder")
        check_plain(worker_arguments, "the argument")
    return [*line, "--module", module, *worker_arguments]


def _resolved(options: LaunchOptions) -> Path:
    assert options.hostfile is not None
    return options.hostfile.resolve()


def _torchrun(options: LaunchOptions, port: int) -> list[str]:
    address = options.address or "127.0.0.1"
    line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(options.nodes)]
    line += ["--nproc-per-node", str(options.processes), "--max-restarts", str(options.max_restarts)]
    if not options.max_restarts:
        return [*line, *("--node-rank", str(options.node_rank), "--master-addr", address, "--master-port", str(port))]
    # Agents tell each other the name of the machine with rank 0, unless they know an address; names need not resolve.
    mine = own_address(address, port) if options.node_count > 1 else None
    # Only agents that meet anew can restart together; node 0 is where they meet.
    return [
        *line,
        *(("--local-addr", mine) if mine else ()),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:{port}", "--rdzv-id", f"moe-train-{port}"),
        *("--rdzv-conf", f"is_host={'true' if options.node_rank == 0 else 'false'}"),
    ]


def _hostfile(options: LaunchOptions, scratch: Path) -> Path:
    """DeepSpeed counts nodes by a hostfile, also where it logs in nowhere."""
    path = scratch / "hostfile"
    lines = [f"node-{node} slots={options.processes}\n" for node in range(options.nodes)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _local_devices(slots: tuple[int, ...], environment: Mapping[str, str]) -> list[str]:
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    processes = len(slots)
    if not visible or environment.get("DS_ACCELERATOR") == "cpu":
        first = slots == tuple(range(processes))
        return ["--num_accelerators", str(processes)] if first else ["--include", include_text({"localhost": slots})]
    # DeepSpeed ignores CUDA_VISIBLE_DEVICES together with --num_accelerators and would take the first devices.
    ids = [part.strip() for part in visible.split(",")]
    if not all(part.isdigit() for part in ids):
        raise ValueError(f"CUDA_VISIBLE_DEVICES={visible}: DeepSpeed's launcher needs numbers; use --launcher torchrun")
    if slots[-1] >= len(ids):
        raise ValueError(f"--processes {slots[-1] + 1}, but CUDA_VISIBLE_DEVICES={visible} names {len(ids)}")
    return ["--include", "localhost:" + ",".join(ids[slot] for slot in slots)]
