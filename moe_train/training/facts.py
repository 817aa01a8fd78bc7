"""What a run says of itself when it starts: model, machines, data."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from moe_train.data.training_set import TrainingSet
from moe_train.parallel.groups import Groups
from moe_train.training.account import (
    active_parameters,
    flops_per_slot,
    flops_per_token,
    flops_without_experts,
    parameters,
)
from moe_train.training.environment import ENVIRONMENT, environment, write_environment
from moe_train.training.peak import peak_flops
from moe_train.training.record import DeviceFacts
from moe_train.training.run_config import RunConfig
from moe_train.training.side_files import spared


def device_facts(config: RunConfig, groups: Groups) -> DeviceFacts:
    """For MFU."""
    cuda = groups.device.type == "cuda"
    return DeviceFacts(
        devices=groups.world_size,
        flops_without_experts=flops_without_experts(config),
        flops_per_slot=flops_per_slot(config),
        peak_flops=peak_flops(torch.cuda.get_device_name(groups.device)) if cuda else None,
    )


def write_facts(config: RunConfig, groups: Groups, run_dir: Path, samples: TrainingSet, step: int) -> None:
    """Writes the environment file of the run and prints what it is to read. Collective; rank 0 writes.

    ``step``: optimizer steps that were taken before."""
    hosts = groups.hosts()
    if groups.rank:
        return
    model = {
        "total_parameters": parameters(config).total,
        "active_parameters": active_parameters(config),
        "flops_per_token": flops_per_token(config).total,
    }
    content = environment(processes=groups.world_size, hosts=hosts, model=model)
    # A run that goes back to a checkpoint comes by again: a full disk need not end it then.
    spared(config.checkpoint, ENVIRONMENT, partial(write_environment, run_dir, content | {"after_step": step}))
    print(samples.describe(config.train.steps * config.train.global_batch_size), flush=True)
