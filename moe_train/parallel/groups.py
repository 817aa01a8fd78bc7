"""Process groups of a run: megatron-core makes them, everybody else gets them from here."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.parallel.device import local_device
from moe_train.parallel.megatron import few_groups, import_megatron
from moe_train.parallel.options import ParallelOptions


@dataclass(frozen=True)
class Groups:
    """The layout as one rank sees it. PP and CP are 1 (refused otherwise). Neighbouring ranks share their tensors (TP);
    with sequence parallelism they read the same samples and divide the positions among them."""

    rank: int
    world_size: int
    data: Any
    """Ranks that hold a replica of the dense parameters and read different samples."""
    expert: Any
    """Ranks over which the experts of one layer are spread."""
    expert_data: Any
    """Ranks that hold a replica of the same experts."""
    tensor: Any
    """Ranks that share divided tensors and read the same samples."""
    device: torch.device

    @property
    def data_rank(self) -> int:
        return dist.get_rank(self.data)

    @property
    def data_size(self) -> int:
        return dist.get_world_size(self.data)

    @property
    def expert_rank(self) -> int:
        return dist.get_rank(self.expert)

    @property
    def expert_size(self) -> int:
        return dist.get_world_size(self.expert)

    @property
    def tensor_size(self) -> int:
        return dist.get_world_size(self.tensor)

    def sum_over_data(self, x: Tensor) -> Tensor:
        """x summed over the data-parallel ranks (a new tensor), the same bits on every rank. The ranks of one tensor
        group, which read the same samples, must give the same."""
        x = x.clone()
        if self.data_size > 1:
            dist.all_reduce(x, group=self.data)
        if self.tensor_size > 1:
            # They computed it each by itself, and state that moves by it must never drift apart.
            dist.broadcast(x, group=self.tensor, group_src=0)
        return x

    def sum_over_tensor(self, x: Tensor) -> Tensor:
        """x summed over the ranks of this tensor group, in place: for what each knows by itself."""
        if self.tensor_size > 1:
            dist.all_reduce(x, group=self.tensor)
        return x

    def largest(self, value: int) -> int:
        """The largest of all ranks' values; every rank must call it."""
        highest = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return int(highest)

    def hosts(self) -> int:
        """Number of machines (by name); every rank must call it."""
        names: list[Any] = [None] * self.world_size
        dist.all_gather_object(names, socket.gethostname())
        return len(set(names))


def initialize(options: ParallelOptions) -> Groups:
    """Starts torch.distributed (unless it runs) and makes the groups of the layout.

    Raises ValueError when the number of processes does not fit the layout.
    """
    # torch 2.13 deprecates the names that DeepSpeed and megatron-core call: one line per rank and call site.
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    device = local_device()
    timeout = datetime.timedelta(seconds=options.timeout_seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            os.environ.setdefault(name, value)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if int(os.environ["WORLD_SIZE"]) == 1 and "MASTER_ADDR" not in os.environ:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)
    return make_groups(options, device)


def make_groups(options: ParallelOptions, device: torch.device) -> Groups:
    """The groups of the layout inside a running torch.distributed; replaces those of an earlier layout."""
    import_megatron()
    from megatron.core import parallel_state

    world_size = dist.get_world_size()
    for name in ("expert", "tensor"):
        if world_size % (size := getattr(options, name)):
            raise ValueError(f"parallel.{name} = {size} does not divide the {world_size} processes of this run")
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    # NCCL makes a communicator for a group when it is used first, and works of several groups go side by side.
    with few_groups() if dist.get_backend() == "gloo" else contextlib.nullcontext():
        parallel_state.initialize_model_parallel(
            options.tensor,
            options.pipeline,
            context_parallel_size=options.context,
            expert_model_parallel_size=options.expert,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
            # megatron-core makes a timedelta of it, so a fraction stays what it is.
            distributed_timeout_minutes=options.timeout_seconds / 60,
        )
    return _present_groups(device)


def single_process(device: torch.device) -> Groups:
    """The groups of a process that works alone, whatever the environment says about launchers. Those that are there
    already stay as they are, so that it may be called any number of times.

    Raises ValueError in a process that shares a layout with others.
    """
    import_megatron()
    from megatron.core import parallel_state

    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Nothing is ever sent, so the groups are the same on every device.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if dist.get_world_size() > 1:
        raise ValueError(
            f"this process is one of {dist.get_world_size()} that work together; load the model in one that works alone"
        )
    if not parallel_state.model_parallel_is_initialized():
        return make_groups(ParallelOptions(), device)
    return _present_groups(device)


def _present_groups(device: torch.device) -> Groups:
    from megatron.core import parallel_state

    return Groups(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        data=parallel_state.get_data_parallel_group(),
        expert=parallel_state.get_expert_model_parallel_group(),
        expert_data=parallel_state.get_expert_data_parallel_group(),
        tensor=parallel_state.get_tensor_model_parallel_group(),
        device=device,
    )
