"""Steps with bad numbers, and replicas that differ, on every rank of a pool."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_train.training.engine import Engine
from moe_train.training.guard.policy import Policy
from moe_train.training.guard.replicas import differences
from moe_train.training.options import GuardOptions
from moe_train.training.step import Measured, StepResult, train_step
from tests.distributed.harness.checkpointing import Snapshot, snapshot
from tests.distributed.harness.training import Case, groups_for, make_engine, micro_batches_of


class BadGradient:
    """Makes one rank's gradient of the final norm infinite while it is on."""

    def __init__(self, engine: Engine, rank: int) -> None:
        self.on = False
        if engine.groups.rank == rank:
            named = engine.module.named_parameters()
            parameter = next(p for name, p in named if name.endswith("final_layernorm.weight"))
            parameter.register_hook(lambda gradient: gradient + float("inf") if self.on else gradient)


@dataclass(frozen=True)
class Skipped:
    before: Snapshot
    after: Snapshot
    """The refused step."""
    end: Snapshot
    """After one more step."""
    taken: list[bool]
    names: list[str]
    """Parameters whose gradient was not finite."""
    norms: list[float]


def skip_a_step(case: Case, bad: int | None, rank: int = 0, what: str = "gradient") -> Skipped:
    """Three steps; the one with number ``bad`` (from 0) has an infinite gradient on one rank, or a loss that the judge
    takes for a spike. Without ``bad`` the second step's data is not trained on at all."""
    engine = make_engine(case, groups_for(case.expert))
    gradient = BadGradient(engine, rank)
    policy = Policy(GuardOptions(spike="skip", window=2))
    names: list[str] = []
    taken: list[bool] = []
    norms: list[float] = []

    def judge(measured: Measured) -> bool:
        loss = measured.loss
        if step == bad and what == "spike":
            policy.losses.values.extend([loss / 3, loss / 3.1])
        verdict = policy.judge(loss, finite=measured.finite, rewinds=0)
        if verdict.action == "skip":
            names.extend(engine.not_finite())
        return verdict.action == "take"

    shots = []
    for step in range(3):
        gradient.on = step == bad and what == "gradient"
        if bad is None and step == 1:
            continue
        shots.append(snapshot(engine, []))
        batches = micro_batches_of(case, engine.groups, step)
        result = train_step(engine, batches, lr=case.optimizer.lr, seed=case.seed, step=step, judge=judge)
        taken.append(result.taken)
        norms.append(engine.gradient_norm())
    shots.append(snapshot(engine, []))
    engine.close()
    return Skipped(shots[1], shots[-2], shots[-1], taken, names, norms)


def flip_a_bit(case: Case, rank: int, where: str) -> tuple[list[Any], list[Any], list[Any]]:
    """What a comparison finds before anything is wrong, after one rank's tensor ``where`` has another bit, and after
    the counters differ: (name, ranks)."""
    engine = make_engine(case, groups_for(case.expert))
    batches = micro_batches_of(case, engine.groups, 0)
    train_step(engine, batches, lr=case.optimizer.lr, seed=case.seed, step=0)
    found = [differences(engine, "step 1")]
    if engine.groups.rank == rank:
        named = dict(engine.module.named_parameters()) | dict(engine.module.named_buffers())
        tensor = next(t for name, t in named.items() if name.endswith(where))
        element = tensor.data.view(-1)[-1:]
        bits = element.view(torch.int16 if element.element_size() == 2 else torch.int32)
        bits ^= 1
    found.append(differences(engine, "step 1"))
    if engine.groups.rank == rank:
        bits ^= 1
    found.append(differences(engine, f"step {1 + (engine.groups.rank == rank)}"))
    engine.close()
    first, second, third = ([(d.name, d.ranks) for d in part] for part in found)
    return first, second, third
