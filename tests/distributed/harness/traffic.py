"""Collectives of a step, counted where torch hands them to a process group, whoever called them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.parallel.groups import Groups
from moe_train.training.step import train_step
from tests.distributed.harness.training import Case, groups_for, make_engine, micro_batches_of, one_step

_METHODS = (
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "scatter",
    "send",
)


@dataclass(frozen=True)
class Call:
    """One collective of this rank."""

    operation: str
    group: str
    """all, data, tensor, expert or expert_data; where two are the same ranks, the first of tensor, data, expert,
    expert_data, all."""
    ranks: int
    tensors: tuple[tuple[str, int, int], ...]
    """(type, elements, bytes) of every tensor argument, results first where the method has both."""
    splits: tuple[int, ...] = ()
    """all_to_all_single: rows for each rank."""


@contextlib.contextmanager
def recorded(groups: Groups) -> Iterator[list[Call]]:
    """Every collective of this process inside."""
    # By their ranks, since DeepSpeed and megatron-core make groups of their own of the same ranks.
    every = [("all", dist.group.WORLD), ("expert_data", groups.expert_data), ("expert", groups.expert)]
    every += [("data", groups.data), *([("tensor", groups.tensor)] if groups.tensor_size > 1 else [])]
    names = {tuple(dist.get_process_group_ranks(group)): name for name, group in every}
    calls: list[Call] = []

    def noted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            tensors = tuple((str(x.dtype), x.numel(), x.numel() * x.element_size()) for x in _tensors(args))
            splits = tuple(int(n) for n in args[3]) if name == "all_to_all_single" else ()
            calls.append(Call(name, names[tuple(dist.get_process_group_ranks(group))], group.size(), tensors, splits))
            return method(group, *args, **kwargs)

        return call

    # From the dictionary: a method of C++ that was read as an attribute does not work when it is put back.
    before = {name: vars(dist.ProcessGroup)[name] for name in _METHODS}
    try:
        for name in before:
            setattr(dist.ProcessGroup, name, noted(name, getattr(dist.ProcessGroup, name)))
        yield calls
    finally:
        for name, method in before.items():
            setattr(dist.ProcessGroup, name, method)


def _tensors(arguments: Any) -> Iterator[Tensor]:
    for argument in arguments:
        if torch.is_tensor(argument):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)


def calls_of_step(case: Case, step: int) -> list[Call]:
    """Those of this rank in one step, after the steps before it."""
    engine = make_engine(case, groups_for(case.expert, case.tensor))
    for number in range(step):
        one_step(engine, case, number)
    batches = micro_batches_of(case, engine.groups, step)
    with recorded(engine.groups) as calls:
        train_step(engine, batches, lr=case.optimizer.lr, seed=case.seed, step=step)
    engine.close()
    return calls
