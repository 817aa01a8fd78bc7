"""Layouts for a number of GPUs, best first, and why the others are ruled out. Arithmetic: nothing is started.

A layout is (TP, EP, DP) with a ZeRO stage, recomputation, offload and a micro-batch size. Whatever the configuration's
own checks refuse is ruled out with their message, so that the planner knows no rules of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moe_train.launch.cost_model import Hardware, Times, step_times
from moe_train.model.families import family_of
from moe_train.training.buffers import Buffers, buffers_per_rank
from moe_train.training.checks import problems
from moe_train.training.memory import HostMemory, Memory, host_memory_per_rank, memory_per_rank, weight_bytes
from moe_train.training.run_config import RunConfig

TENSOR_SIZES = (1, 2, 4)
KEYS = {
    "parallel.tensor": "tensor",
    "parallel.expert": "expert",
    "train.zero_stage": "zero",
    "train.recompute": "recompute",
    "train.offload_optimizer": "offload",
    "train.micro_batch_size": "micro_batch",
}
"""What the planner chooses; a key that was given on the command line keeps its value."""
START = ("parallel.tensor=1", "parallel.expert=1", "train.micro_batch_size=1")
"""Overrides under which a configuration is read: what it says about its own layout must not stand in the way."""


@dataclass(frozen=True, order=True)
class Layout:
    tensor: int
    expert: int
    data: int
    """Data-parallel ranks: those that read different samples."""
    zero: int
    recompute: bool
    offload: str
    micro_batch: int

    def __str__(self) -> str:
        more = [text for text, on in (("recompute", self.recompute), ("offload", self.offload != "none")) if on]
        name = f"TP {self.tensor}, EP {self.expert}, DP {self.data}, ZeRO {self.zero}"
        return ", ".join([name, *more, f"micro-batch {self.micro_batch}"])

    def overrides(self) -> list[str]:
        """``key=value`` for moe-train train."""
        values = {key: getattr(self, name) for key, name in KEYS.items()}
        return [f"{key}={str(value).lower()}" for key, value in values.items()]


@dataclass(frozen=True)
class Plan:
    layout: Layout
    accumulation: int
    memory: Memory
    buffers: Buffers
    host: HostMemory
    times: Times
    config: RunConfig

    @property
    def need(self) -> int:
        """Bytes of one GPU."""
        return need(self.memory, self.buffers)


@dataclass(frozen=True)
class RuledOut:
    layout: str
    reason: str
    need: int | None = None
    """Bytes of one GPU, where it is memory that lacks."""


@dataclass(frozen=True)
class Proposal:
    plans: list[Plan]
    """Shortest step first."""
    ruled_out: list[RuledOut]


def need(memory: Memory, buffers: Buffers) -> int:
    """Bytes at the most; the module must have fitted whole before ZeRO 3 divided it."""
    return max(memory.total + buffers.total, buffers.start)


def propose(config: RunConfig, hardware: Hardware, pinned: Iterable[str] = ()) -> Proposal:
    """All layouts on all of the GPUs. ``pinned``: keys of ``KEYS`` whose value in ``config`` stands."""
    fixed = {KEYS[key] for key in pinned if key in KEYS}
    plans: list[Plan] = []
    ruled_out: list[RuledOut] = []
    for tensor, expert in _groups(config, hardware, fixed):
        if refused := _refused(config, hardware, tensor, expert):
            ruled_out.append(refused)
            continue
        for zero, recompute, offload in _ways(config, fixed):
            answer = _best_micro_batch(config, hardware, (tensor, expert, zero, recompute, offload), fixed)
            if isinstance(answer, Plan):
                plans.append(answer)
            else:
                ruled_out.append(answer)
    # Of two that take the same time the one that needs less memory.
    return Proposal(sorted(plans, key=lambda plan: (float(f"{plan.times.total:.3g}"), plan.need)), ruled_out)


def _groups(config: RunConfig, hardware: Hardware, fixed: set[str]) -> Iterator[tuple[int, int]]:
    """(TP, EP): every divisor of the number of GPUs for experts."""
    tensors = [config.parallel.tensor] if "tensor" in fixed else TENSOR_SIZES
    experts = [size for size in range(1, hardware.gpus + 1) if hardware.gpus % size == 0]
    if "expert" in fixed:
        experts = [config.parallel.expert]
    elif not family_of(config.model).experts:
        experts = [1]
    return ((tensor, expert) for tensor in tensors for expert in experts)


def _ways(config: RunConfig, fixed: set[str]) -> Iterator[tuple[int, bool, str]]:
    train = config.train
    stages = [train.zero_stage] if "zero" in fixed else [1, 2, 3]
    recompute = [train.recompute] if "recompute" in fixed else [False, True]
    offload = [train.offload_optimizer] if "offload" in fixed else ["none", "cpu"]
    return ((stage, again, where) for stage in stages for again in recompute for where in offload)


def _with(config: RunConfig, **values: Any) -> RunConfig:
    """``config`` with the planner's choices."""
    sections: dict[str, dict[str, Any]] = {"parallel": {}, "train": {}}
    for key, name in KEYS.items():
        if name in values:
            section, option = key.split(".")
            sections[section][option] = values[name]
    parallel = dataclasses.replace(config.parallel, **sections["parallel"])
    return dataclasses.replace(config, parallel=parallel, train=dataclasses.replace(config.train, **sections["train"]))


def _refused(config: RunConfig, hardware: Hardware, tensor: int, expert: int) -> RuledOut | None:
    """What the checks of a run say against it, whatever the micro-batch."""
    tried = _with(config, tensor=tensor, expert=expert, micro_batch=1, offload="none", zero=1)
    found = problems(tried, hardware.gpus)
    if not found:
        return None
    reasons = "; ".join(f"{problem.path}: {problem.message}" for problem in found)
    return RuledOut(f"TP {tensor}, EP {expert}", reasons)


def _best_micro_batch(
    config: RunConfig, hardware: Hardware, way: tuple[int, int, int, bool, str], fixed: set[str]
) -> Plan | RuledOut:
    """The micro-batch of the shortest step; the larger one of two that take the same time."""
    tensor, expert, zero, recompute, offload = way
    values: dict[str, Any] = {
        "tensor": tensor, "expert": expert, "zero": zero, "recompute": recompute, "offload": offload,
    }  # fmt: skip
    data = _with(config, **values).data_parallel_size(hardware.gpus)
    sizes = _micro_batches(config, data, fixed)
    first = Layout(data=data, micro_batch=sizes[0], **values)
    if found := problems(_with(config, micro_batch=sizes[0], **values), hardware.gpus):
        return RuledOut(str(first), "; ".join(f"{problem.path}: {problem.message}" for problem in found))
    best: Plan | None = None
    for size in sizes:
        layout = dataclasses.replace(first, micro_batch=size)
        tried = _with(config, micro_batch=size, **values)
        memory, buffers = memory_per_rank(tried, hardware.gpus, "cuda"), buffers_per_rank(tried, hardware.gpus)
        host = host_memory_per_rank(tried, hardware.gpus, "cuda")
        if lack := _lack(memory, buffers, host, weight_bytes(tried), hardware):
            # More sequences at a time need more memory still.
            return best or RuledOut(str(layout), lack, need(memory, buffers))
        times = step_times(tried, hardware)
        if best is None or times.total <= best.times.total:
            accumulation = tried.accumulation_steps(hardware.gpus)
            best = Plan(layout, accumulation, memory, buffers, host, times, tried)
    assert best is not None
    return best


def _micro_batches(config: RunConfig, data: int, fixed: set[str]) -> list[int]:
    """Powers of two that divide the sequences of a rank."""
    if "micro_batch" in fixed:
        return [config.train.micro_batch_size]
    per_rank = config.train.global_batch_size // data
    return [2**power for power in range(per_rank.bit_length()) if per_rank % 2**power == 0]


def _lack(memory: Memory, buffers: Buffers, host: HostMemory, item: int, hardware: Hardware) -> str:
    """What does not fit; empty where all does."""
    if (needed := need(memory, buffers)) > hardware.usable:
        kinds: Mapping[str, int] = {
            "parameters": memory.parameters,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "activations": memory.activations,
            "buffers": buffers.total,
        }
        what = ", ".join(f"{name} {size / 2**30:,.1f}" for name, size in kinds.items() if size)
        if needed == buffers.start:
            what = "the module at the start, before ZeRO 3 divides it"
        return f"does not fit: {needed / 2**30:,.1f} of {hardware.usable / 2**30:,.1f} GiB ({what})"
    # The model is made in float32 in host memory, by every rank of a node, before the rest is there.
    start = buffers.start // item * 4
    on_host = hardware.ranks_per_node * max(host.total, start)
    if hardware.host_memory is not None and on_host > hardware.host_memory * 2**30:
        kinds = {"offloaded optimizer": host.optimizer, "copy for background saves": host.save_copy}
        if start > host.total:
            kinds = {"the module at the start": start}
        what = ", ".join(f"{name} {size / 2**30:,.1f}" for name, size in kinds.items() if size)
        return (
            f"does not fit into host memory: {on_host / 2**30:,.0f} of {hardware.host_memory:,.0f} GiB per node "
            f"({what} for each rank)"
        )
    return ""
