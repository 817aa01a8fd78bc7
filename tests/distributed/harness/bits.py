"""Small observations and sabotage on every rank of a pool."""

from __future__ import annotations

import dataclasses
import datetime
import unittest.mock
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe_train.model.micro_batch import MicroBatch, current
from moe_train.model.moe_layer import moe_layers
from moe_train.parallel.groups import make_groups
from moe_train.parallel.options import ParallelOptions
from moe_train.routing import topk
from moe_train.routing.interface import LossTerm
from moe_train.training.collected import Collector
from moe_train.training.step import Requests, train_step
from moe_train.training.validation import forward_function
from tests.distributed.harness import layers, training
from tests.distributed.harness.training import Case, Record, groups_for, groups_of, make_engine, micro_batches_of


def gate_state_types(case: Case) -> dict[str, set[str]]:
    """Types of gate state and of parameters inside a fresh engine."""
    engine = make_engine(case, groups_of(case))
    buffers = {str(b.dtype) for n, b in engine.module.named_buffers() if n.endswith("bias_E")}
    parameters = {str(p.dtype) for p in engine.module.parameters()}
    engine.close()
    return {"buffers": buffers, "parameters": parameters}


def linear_is_torchs_own(case: Case) -> bool:
    """Whether torch.nn.functional.linear is what it was, while an engine exists."""
    engine = make_engine(case, groups_of(case))
    untouched = F.linear is torch._C._nn.linear
    engine.close()
    return untouched


def group_timeouts(expert: int, seconds: float) -> dict[str, datetime.timedelta]:
    """Timeout of every process group that a layout has made and this rank is in."""
    from megatron.core import parallel_state

    make_groups(ParallelOptions(expert=expert, timeout_seconds=seconds), torch.device("cpu"))
    groups = {n: g for n, g in vars(parallel_state).items() if isinstance(g, dist.ProcessGroup)}
    timeouts = {n: g._get_backend(torch.device("cpu")).options._timeout for n, g in groups.items()}
    for group in set(groups.values()):
        dist.destroy_process_group(group)
    return timeouts


def ranks_of_groups(expert: int, tensor: int) -> list[list[int]]:
    """Of every process group of a layout that this rank is in, besides those that the engine is told of, each once."""
    from megatron.core import parallel_state

    present = make_groups(ParallelOptions(expert=expert, tensor=tensor), torch.device("cpu"))
    groups = {g for g in vars(parallel_state).values() if isinstance(g, dist.ProcessGroup)}
    own = {present.data, present.expert, present.expert_data, present.tensor}
    assert len(own) == 4, "ZeRO 3 tells them apart"
    ranks = [dist.get_process_group_ranks(group) for group in groups - own]
    for group in groups:
        dist.destroy_process_group(group)
    return ranks


def collected_counts(load: int) -> tuple[int, float]:
    """What two micro-batches with so many tokens on one expert of every rank add up to."""
    collector = Collector([0])
    for _ in range(2):
        micro_batch = MicroBatch(tokens=None)  # type: ignore[arg-type]
        micro_batch.sums[0] = {"load": torch.tensor([load, 1])}
        micro_batch.losses[0] = {"z": LossTerm(torch.tensor(1.0), torch.tensor(load), "token", 1.0)}
        collector.add(torch.tensor(0.0), micro_batch)
    sums, losses, _ = collector.reduce(groups_for(1))
    assert sums[0]["load"].dtype == torch.int64
    return int(sums[0]["load"][0]), losses[0]["z"][1]


class _Poison(torch.autograd.Function):
    """NaN in the rows from ``owned`` on, in the value, the gradient, or both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, owned: int, value: bool) -> Tensor:
        ctx.owned = owned
        x = x.clone()
        if value:
            x[owned:] = float("nan")
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.clone()
        grad[ctx.owned :] = float("nan")
        return grad, None, None


def train_with_poisoned_rows(case: Case) -> tuple[list[Record], int]:
    """As ``train``, where the rows that grouped_mm leaves uninitialised hold NaN, in forward and in backward. Also how
    many such rows there were."""
    original = F.grouped_mm
    poisoned = 0

    def grouped_mm(x: Tensor, w: Tensor, *, offs: Tensor) -> Tensor:
        nonlocal poisoned
        owned = int(offs[-1])
        poisoned += x.shape[0] - owned
        y = original(_Poison.apply(x, owned, False), w, offs=offs)
        return _Poison.apply(y, owned, True)

    with unittest.mock.patch.object(F, "grouped_mm", grouped_mm):
        records = training.train(case)
    return records, poisoned


def train_with_other_ties_in_recomputation(case: Case) -> tuple[list[Record], int]:
    """As ``train``, where a recomputation that were to select again would give ties to the higher index. Also how
    often a recomputation asked."""
    asked = 0
    original = topk.top_k

    def top_k(scores_TE: Tensor, k: int, among_TE: Tensor | None = None) -> Tensor:
        nonlocal asked
        if not current().recomputing:
            return original(scores_TE, k, among_TE)
        asked += 1
        flipped = None if among_TE is None else among_TE.flip(1)
        return scores_TE.shape[1] - 1 - original(scores_TE.flip(1), k, flipped)

    # select_top_k, which the other gates call, looks it up beside itself.
    users = ("topk", "groups", "gates.dynamic_k")
    patches = [unittest.mock.patch(f"moe_train.routing.{user}.top_k", top_k) for user in users]
    for patch in patches:
        patch.start()
    try:
        return training.train(case), asked
    finally:
        for patch in patches:
            patch.stop()


def train_and_evaluate_in_between(case: Case) -> tuple[list[Record], int]:
    """As ``train``, with an evaluation after each step. Also how often multi-token prediction was called."""
    engine = make_engine(case, groups_of(case))
    assert engine.module.mtp is not None
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    engine.module.mtp.register_forward_hook(count)
    records = []
    for step in range(case.steps):
        records.append(training.one_step(engine, case, step))
        engine.set_training(False)
        forward = forward_function(engine, engine.groups)
        for batch in training.micro_batches_of(case, engine.groups, step):
            nll_BS, routings = forward(batch)
            assert nll_BS.isfinite().all() and len(routings) == len(moe_layers(engine.module)) - 1
    engine.close()
    return records, calls


def step_with_infinite_gradient(case: Case, rank: int) -> tuple[str, list[Tensor]]:
    """A step in which one rank's gradient of the final norm is infinite: what is raised, and the gates' biases."""
    engine = make_engine(case, groups_of(case))
    if engine.groups.rank == rank:
        parameter = next(p for name, p in engine.module.named_parameters() if name.endswith("final_layernorm.weight"))
        parameter.register_hook(lambda gradient: gradient + float("inf"))
    try:
        training.one_step(engine, case, 0)
        message = ""
    except FloatingPointError as error:
        message = str(error)
    biases = [b.clone() for n, b in engine.module.named_buffers() if n.endswith("bias_E")]
    engine.close()
    return message, biases


def step_without_targets(case: Case) -> str:
    """What is raised where no token of a step counts in the loss, on any rank."""
    engine = make_engine(case, groups_of(case))
    batches = [
        dataclasses.replace(batch, target_BS=torch.zeros_like(batch.target_BS))
        for batch in training.micro_batches_of(case, engine.groups, 0)
    ]
    try:
        train_step(engine, batches, lr=case.optimizer.lr, seed=case.seed, step=4)
        message = ""
    except ValueError as error:
        message = str(error)
    engine.close()
    return message


def repeated_layer(case: Case, times: int) -> bool:
    """Whether the layer's output and all gradients are the same bits each time."""
    first = layers.moe_layer(case, None, dtype=torch.float32)
    same = True
    for _ in range(times - 1):
        again = layers.moe_layer(case, None, dtype=torch.float32)
        if first is None or again is None:
            continue
        same &= torch.equal(first.y_SBH, again.y_SBH) and torch.equal(first.dx_SBH, again.dx_SBH)
        same &= all(torch.equal(first.gradients[name], again.gradients[name]) for name in first.gradients)
    return same


def fail_on(rank: int, how: str) -> int:
    """For the tests of the pool itself."""
    if dist.get_rank() == rank:
        if how == "raise":
            raise RuntimeError("on purpose")
        if how == "exit":
            import os

            os._exit(3)
    total = torch.ones(1)
    if how != "nothing":
        dist.all_reduce(total)  # the others wait here for ever
    return dist.get_rank()


def wait_for_ever() -> None:
    import time

    time.sleep(3600)


def requests_seen(case: Case) -> list[tuple[bool, bool]]:
    """(stop, save) that come out of steps in each of which another rank alone wants to stop and save."""
    engine, seen = make_engine(case, groups_of(case)), []
    for rank in range(engine.groups.world_size):
        mine = Requests(stop=engine.groups.rank == rank, save=engine.groups.rank == rank)
        batches = micro_batches_of(case, engine.groups, rank)
        result = train_step(engine, batches, lr=case.optimizer.lr, seed=case.seed, step=rank, requests=mine)
        seen.append((result.requests.stop, result.requests.save))
    engine.close()
    return seen
