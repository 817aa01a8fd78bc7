"""The configuration of a case, for what is computed from configurations."""

from __future__ import annotations

from typing import Any

from moe_train.data.options import DataOptions
from moe_train.parallel.options import ParallelOptions
from moe_train.training.options import TrainOptions
from moe_train.training.run_config import RunConfig
from tests.distributed.harness.training import Case


def config_of(case: Case, size: int) -> RunConfig:
    """That ``size`` processes train the case with."""
    keys: dict[str, Any] = {}
    if case.reuse is not None:
        keys = {"stage3_max_reuse_distance": case.reuse, "stage3_prefetch_bucket_size": 0}
    return RunConfig(
        model=case.model,
        router=case.router,
        parallel=ParallelOptions(expert=case.expert, tensor=case.tensor),
        data=DataOptions(sequence_length=case.length),
        optimizer=case.optimizer,
        train=TrainOptions(
            global_batch_size=case.sequences,
            micro_batch_size=case.sequences * case.tensor // size // case.accumulation,
            precision=case.precision,
            zero_stage=case.zero,  # type: ignore[arg-type]
            recompute=case.recompute,
            offload_optimizer="cpu" if case.offload else "none",
        ),
        deepspeed={"zero_optimization": keys} if keys else {},
    )
