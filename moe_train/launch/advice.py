"""What would help where no layout fits: single changes, each tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from moe_train.launch.cost_model import Hardware
from moe_train.launch.layouts import Proposal, propose
from moe_train.training.run_config import RunConfig

SMALL_BUCKET = 5 * 10**7
_DOUBLINGS = 8


def advice(config: RunConfig, hardware: Hardware, proposal: Proposal, pinned: Iterable[str]) -> list[str]:
    """Sentences; empty where nothing that is known here would help."""
    pinned = list(pinned)
    needs = [refused.need for refused in proposal.ruled_out if refused.need is not None]
    found = []
    if needs and (least := min(needs)) > hardware.usable:
        memory = least / 2**30 / (1 - hardware.reserve)
        found.append(f"--memory {memory:,.0f}: the least that a layout needs, with the part that is kept free")
    if pinned and propose(config, hardware).plans:
        found.append(f"without {' and '.join(pinned)}, which rule out layouts that fit")
    found += [text for text, changed in _changes(config, hardware) if propose(changed, hardware, pinned).plans]
    return found + _more_gpus(config, hardware, pinned)


def with_even_batch(config: RunConfig, hardware: Hardware) -> RunConfig:
    """The next larger batch that all GPUs can share, however they are laid out."""
    batch = -(-config.train.global_batch_size // hardware.gpus) * hardware.gpus
    return dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch_size=batch))


def _changes(config: RunConfig, hardware: Hardware) -> Iterator[tuple[str, RunConfig]]:
    train, data, section = config.train, config.data, config.deepspeed.get("zero_optimization", {})
    even = with_even_batch(config, hardware)
    if even.train.global_batch_size != train.global_batch_size:
        yield f"train.global_batch_size={even.train.global_batch_size}", even
    if train.precision == "float32":
        changed = dataclasses.replace(train, precision="bfloat16")
        yield "train.precision=bfloat16", dataclasses.replace(config, train=changed)
    if "reduce_bucket_size" not in section:
        keys = {**section, "reduce_bucket_size": SMALL_BUCKET}
        changed_keys = {**config.deepspeed, "zero_optimization": keys}
        text = f"deepspeed.zero_optimization.reduce_bucket_size={SMALL_BUCKET}: 2 GB of DeepSpeed's buffers less"
        yield text, dataclasses.replace(config, deepspeed=changed_keys)
    if (half := data.sequence_length // 2) > 1:
        changed_data = dataclasses.replace(data, sequence_length=half)
        yield f"data.sequence_length={half}", dataclasses.replace(config, data=changed_data)
    if hardware.host_memory is not None and config.checkpoint.asynchronous:
        waits = dataclasses.replace(config.checkpoint, asynchronous=False)
        text = "checkpoint.asynchronous=false: no copy in host memory, and training waits while files are written"
        yield text, dataclasses.replace(config, checkpoint=waits)


def _more_gpus(config: RunConfig, hardware: Hardware, pinned: list[str]) -> list[str]:
    """The first doubling on which a layout fits, with as many more sequences as it needs."""
    for power in range(1, _DOUBLINGS + 1):
        gpus = hardware.gpus * 2**power
        if gpus > hardware.gpus_per_node and gpus % hardware.gpus_per_node:
            return []
        for batch in sorted({config.train.global_batch_size, max(config.train.global_batch_size, gpus)}):
            more = dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch_size=batch))
            if propose(more, dataclasses.replace(hardware, gpus=gpus), pinned).plans:
                batches = "" if batch == config.train.global_batch_size else f" with train.global_batch_size={batch}"
                return [f"--gpus {gpus}{batches}"]
    return []
