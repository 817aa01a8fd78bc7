"""What an engine holds in memory on each rank of a pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_train.training.engine import Engine
from tests.distributed.harness.training import Case, groups_for, make_engine, one_step


def optimizer_storage(case: Case) -> dict[str, Any]:
    """After ``case.steps``: types of masters and moments, and bytes that they share with the module's parameters."""
    engine = make_engine(case, groups_for(case.expert))
    for step in range(case.steps):
        one_step(engine, case, step)
    optimizer, stepped = engine.zero.optimizer, optimizer_tensors(engine)
    result = {
        "kind": type(optimizer).__name__,
        "dtypes": {str(x.dtype) for x in stepped},
        "shared_with_parameters": sum(
            size for place, size in storages(stepped).items() if place in storages(parameter_tensors(engine))
        ),
    }
    engine.close()
    return result


def optimizer_tensors(engine: Engine) -> list[Tensor]:
    """Masters and moments."""
    zero = engine.zero
    stage_3 = engine.train.zero_stage == 3
    masters = zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups
    states = [zero.optimizer.state[master].values() for master in masters]
    return [*masters, *(x for state in states for x in state if torch.is_tensor(x) and x.dim())]


def parameter_tensors(engine: Engine) -> list[Tensor]:
    """What this rank holds of the module's parameters: its pieces under ZeRO 3."""
    return [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of each storage that a tensor lies in, by its address."""
    found = [x.untyped_storage() for x in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}
