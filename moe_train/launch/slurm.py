"""A worker that srun started: its place among the others, from Slurm's variables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

FIRST_PORT = 20000
PORTS = 10000
_NEEDED = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_ID")


def number_of_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of the step; ValueError outside of one."""
    missing = [name for name in _NEEDED if not environment.get(name, "").isdigit()]
    if missing:
        raise ValueError(
            f"--launcher srun runs inside a step of Slurm: {', '.join(missing)} is not set. Start it with "
            "`srun moe-train train ...`, one task for each accelerator"
        )
    return int(_of_step(environment, "NUM_TASKS") or environment["SLURM_NTASKS"])


def worker_variables(
    environment: Mapping[str, str], master_addr: str | None = None, master_port: int | None = None
) -> dict[str, str]:
    """What torch.distributed asks for. Without an address the first host of the step, where task 0 runs; without a
    port one that follows from the job's number, the same on all hosts. Raises ValueError outside of a step."""
    tasks = number_of_tasks(environment)
    rank = int(environment["SLURM_PROCID"])
    if not 0 <= rank < tasks:
        raise ValueError(f"SLURM_PROCID={rank}, but the step has {tasks} tasks")
    if master_addr is None:
        nodelist = _of_step(environment, "NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
        master_addr = next(hosts_of(nodelist or environment.get("SLURM_NODELIST", "")))
    if master_port is None:
        # Several steps of a job may run side by side.
        step = int(_of_step(environment, "ID") or 0)
        master_port = FIRST_PORT + (int(environment["SLURM_JOB_ID"]) * 10 + step) % PORTS
    return {
        "RANK": str(rank),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": str(master_port),
    }


def launch_of_step(environment: Mapping[str, str]) -> str:
    """A name that a step's tasks have in common, and no other step. A job that is queued again keeps its number."""
    again = environment.get("SLURM_RESTART_COUNT", "")
    step = int(_of_step(environment, "ID") or 0)
    return f"slurm-{environment['SLURM_JOB_ID']}-{step}-{again if again.isdigit() else 0}"


def check_devices(environment: Mapping[str, str], accelerators: int) -> None:
    """ValueError where this task does not see the accelerator that is its own."""
    local = int(environment["SLURM_LOCALID"])
    if accelerators and local >= accelerators:
        raise ValueError(
            f"task {local} of this node sees {accelerators} accelerator(s). Every task must see all that the node has "
            "(srun --gpu-bind=none, without --gpus-per-task), and there must be no more tasks than accelerators"
        )


def hosts_of(nodelist: str) -> Iterator[str]:
    """The hosts of Slurm's notation, such as ``gpu[01-03,7],login``, in order. Raises ValueError where it is none."""
    if not nodelist or not re.fullmatch(r"[\w.\[\],-]+", nodelist, re.ASCII):
        raise ValueError(f"a list of hosts reads such as node[01-03,7], got {nodelist!r}")
    # A comma outside of brackets separates hosts.
    for part in re.split(r",(?![^\[]*\])", nodelist):
        yield from _expanded(part, nodelist)


def _expanded(part: str, nodelist: str) -> Iterator[str]:
    match = re.fullmatch(r"([^\[\]]*)\[([\d,-]+)\](.*)", part)
    if match is None:
        if not part or "[" in part or "]" in part:
            raise ValueError(f"a list of hosts reads such as node[01-03,7], got {nodelist!r}")
        yield part
        return
    head, numbers, tail = match.groups()
    for piece in numbers.split(","):
        first, _, last = piece.partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or piece.endswith("-"):
            raise ValueError(f"a list of hosts reads such as node[01-03,7], got {nodelist!r}")
        for number in range(int(first), int(last or first) + 1):
            yield from _expanded(f"{head}{number:0{len(first)}d}{tail}", nodelist)


def _of_step(environment: Mapping[str, str], name: str) -> str | None:
    """A variable of the step; unset where none has begun, or where the job's batch script is looked at."""
    return environment.get(f"SLURM_STEP_{name}")
