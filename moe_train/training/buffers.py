"""What DeepSpeed (0.19.8) needs on the device besides parameters, gradients and optimizer, by arithmetic.

The bucket that gradients are collected in has its full size (``reduce_bucket_size``, 5e8 elements, 2 GB in float32)
however small the model is; set it in ``deepspeed.zero_optimization`` where that matters.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.training.memory import FLOAT32, weight_bytes
from moe_train.training.partition import parts, units
from moe_train.training.run_config import RunConfig
from moe_train.training.traffic import MAX_REUSE_DISTANCE, zero_keys

REDUCE_BUCKET = 5 * 10**8
PREFETCH_BUCKET = 5 * 10**7


@dataclass(frozen=True)
class Buffers:
    """Bytes on one rank."""

    bucket: int
    """Of the gradients that are reduced together; two with ``overlap_comm``."""
    reduction: int
    """The copy of a full bucket that the reduction works on."""
    gathered: int
    """ZeRO 3: the parameters that are whole at one time."""
    start: int
    """Not in ``total``: the module, before ZeRO 3 shards it. It must fit when nothing else is there yet."""

    @property
    def total(self) -> int:
        return self.bucket + self.reduction + self.gathered


def buffers_per_rank(config: RunConfig, world_size: int) -> Buffers:
    """Bytes per rank, at most."""
    keys, stage, item = zero_keys(config), config.train.zero_stage, weight_bytes(config)
    held = sum(part.elements for part in parts(config, world_size))
    elements = int(float(keys.get("reduce_bucket_size", REDUCE_BUCKET)))
    # ZeRO 2 collects gradients as they come from the backward pass; the others in float32.
    bucket = elements * (item if stage == 2 else FLOAT32) * (2 if keys.get("overlap_comm") and stage < 3 else 1)
    return Buffers(
        bucket=bucket,
        reduction=FLOAT32 * min(elements, held),
        gathered=item * _whole_at_once(config, world_size) if stage == 3 else 0,
        start=item * held,
    )


def _whole_at_once(config: RunConfig, world_size: int) -> int:
    """Elements: those that are kept for the backward pass, and the largest layer with what is fetched ahead."""
    keys = zero_keys(config)
    distance = int(float(keys.get("stage3_max_reuse_distance", MAX_REUSE_DISTANCE)))
    ahead = int(float(keys.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET)))
    sizes = [sum(p.elements for p in unit) for _, unit in units(config, world_size)]
    between, kept = 0, 0
    for size in reversed(sizes):
        kept += size if between < distance else 0
        between += 2 * size
    return min(sum(sizes), kept + max(sizes) + ahead)
