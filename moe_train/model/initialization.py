"""Initial weights: a function of (seed, global name, global expert index) only, never of the layout."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from moe_train.model.experts.module import Experts
from moe_train.model.options import ModelOptions
from moe_train.parallel.shard import shard_of
from moe_train.routing.interface import Gate

_INTO_RESIDUAL = ("self_attention.linear_proj.weight", "experts.weight2", "mlp.weight2")


def initialize_weights(model: nn.Module, options: ModelOptions, seed: int) -> None:
    """Overwrites every parameter: normal(0, std) for matrices, ones for norm weights, zeros for biases; a gate may
    choose its own. Matrices that write into the residual stream use std / sqrt(2 * layers) when so configured."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = modules[name.rpartition(".")[0]]
            std = options.init.std
            if options.init.scaled_residual and name.endswith(_INTO_RESIDUAL):
                std /= math.sqrt(2 * options.num_layers)
            if isinstance(owner, Experts):
                for local in range(owner.num_local):
                    generator = _generator(seed, name, owner.first + local)
                    parameter[local].copy_(torch.randn(parameter.shape[1:], generator=generator) * std)
                continue
            generator = _generator(seed, name)
            if (shard := shard_of(parameter)) is not None:
                parameter.copy_(shard.take(torch.randn(shard.shape, generator=generator) * std))
                continue
            parameter.copy_(_initial(name, parameter, modules, std, generator))
        for name, buffer in model.named_buffers():
            if (own := _of_gate(name, buffer, modules, _generator(seed, name))) is not None:
                buffer.copy_(own)


def initial_gate(gate: Gate, name: str, seed: int, std: float) -> dict[str, Tensor]:
    """Initial values of a gate that has this name in the model, as `initialize_weights` gives them."""
    modules: dict[str, nn.Module] = {name: gate}
    parameters = {f"{name}.{own}": parameter for own, parameter in gate.named_parameters()}
    values = {full: _initial(full, p, modules, std, _generator(seed, full)).float() for full, p in parameters.items()}
    for full, buffer in ((f"{name}.{own}", buffer) for own, buffer in gate.named_buffers()):
        own = _of_gate(full, buffer, modules, _generator(seed, full))
        values[full] = buffer.clone() if own is None else own.to(buffer.dtype)
    return values


def noise_of_expert(seed: int, name: str, expert: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers that belong to one expert of a tensor, whatever the layout."""
    return torch.randn(shape, generator=_generator(seed, f"noise/{name}", expert))


def _initial(
    name: str, parameter: Tensor, modules: dict[str, nn.Module], std: float, generator: torch.Generator
) -> Tensor:
    if (own := _of_gate(name, parameter, modules, generator)) is not None:
        return own
    shape = tuple(parameter.shape)
    if parameter.dim() >= 2:
        return torch.randn(shape, generator=generator) * std
    return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)


def _of_gate(name: str, tensor: Tensor, modules: dict[str, nn.Module], generator: torch.Generator) -> Tensor | None:
    """What the gate that holds the tensor wants it to be at the start."""
    prefix, gate = _gate_of(name, modules)
    return None if gate is None else gate.initial(name.removeprefix(prefix + "."), tuple(tensor.shape), generator)


def _gate_of(name: str, modules: dict[str, nn.Module]) -> tuple[str, Gate | None]:
    """The gate that holds the parameter, at any depth, and its name."""
    prefix = name
    while prefix:
        prefix = prefix.rpartition(".")[0]
        module = modules.get(prefix)
        if isinstance(module, Gate):
            return prefix, module
    return "", None


def _generator(seed: int, name: str, expert: int | None = None) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{expert}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
