"""Parameter groups and the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_train.routing.interface import Gate
from moe_train.training.options import OptimizerOptions


def parameter_groups(model: nn.Module, options: OptimizerOptions) -> list[dict[str, Any]]:
    """Groups by (weight decay, gate or not, where replicas live), never empty, in a fixed order.

    Norms, biases and what a gate names (prototypes) get no decay; gates have their own learning-rate factor
    (``lr_factor``); experts, and matrices that tensor parallelism divides, need groups of their own (``moe``, as
    DeepSpeed calls both), because their replicas live in other process groups.
    """
    gate_parameters, no_decay = _gate_parameters(model)
    groups: dict[tuple[bool, str, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        expert = not getattr(parameter, "allreduce", True)
        place = getattr(parameter, "group_name", "") if expert else "dense"
        decay = parameter.dim() >= 2 and name not in no_decay
        gate = name in gate_parameters
        group = groups.setdefault(
            (expert, place, gate, decay),
            {
                # DeepSpeed finds the process group of an expert group by its name.
                "name": place,
                "params": [],
                "lr": options.lr * (options.gate_lr_factor if gate else 1.0),
                "lr_factor": options.gate_lr_factor if gate else 1.0,
                "weight_decay": options.weight_decay if decay else 0.0,
                **({"moe": True} if expert else {}),
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _gate_parameters(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of all gate parameters, and of those among them that get no weight decay."""
    every, no_decay = set(), set()
    for prefix, module in model.named_modules():
        if isinstance(module, Gate):
            every |= {f"{prefix}.{name}" for name, _ in module.named_parameters()}
            no_decay |= {f"{prefix}.{name}" for name in module.no_decay_parameters()}
    return every, no_decay


def build_optimizer(groups: list[dict[str, Any]], options: OptimizerOptions) -> torch.optim.Optimizer:
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=options.lr)
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)
