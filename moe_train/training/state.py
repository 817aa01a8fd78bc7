"""What a checkpoint of a run holds, gathered from engine, gates and generators, and put back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.checkpoint.loading import load
from moe_train.checkpoint.reading import StoredTensors
from moe_train.checkpoint.slices import OwnedSlice
from moe_train.checkpoint.state import read_state
from moe_train.model.experts.module import Experts
from moe_train.parallel.groups import Groups
from moe_train.parallel.passing import may_pass
from moe_train.parallel.shard import shard_of
from moe_train.routing.interface import Gate
from moe_train.training.engine import Engine
from moe_train.training.environment import versions


def run_slices(engine: Engine) -> list[OwnedSlice]:
    """What this rank owns of a checkpoint: parameters and moments as float32 masters, gate state, generators."""
    slices = [*engine.owned_slices(), *_gate_state(engine)]
    return slices + [_whole(key, state) for key, state in _generators(engine.groups).items()]


def weight_slices(engine: Engine) -> list[OwnedSlice]:
    """Of a checkpoint of weights alone."""
    return [owned for owned in engine.owned_slices() if owned.key.startswith("model.")] + _gate_state(engine)


def run_state(
    engine: Engine,
    *,
    consumed: int,
    tokens: int,
    samples: dict[str, Any],
    config: dict[str, Any],
    history: Sequence[dict[str, Any]] = (),
    guard: dict[str, Any] | None = None,
    validation_owed: bool = False,
) -> dict[str, Any]:
    """What a checkpoint says besides its tensors.

    ``samples``: which samples there are and in which order, so that a resumed run can tell whether they are the same.
    ``history``: who took the steps up to here (training/history.py). ``guard``: what it remembers (training/guard).
    ``validation_owed``: one is due after this step, and was not made when this was saved.
    """
    return {
        "consumed_samples": consumed,
        "tokens": tokens,
        "samples": samples,
        "optimizer_steps": engine.optimizer_steps(),
        "layout": _layout(engine),
        "config": config,
        "history": list(history),
        "guard": guard or {},
        "validation_owed": validation_owed,
        "versions": versions(),
    }


def load_checkpoint(engine: Engine, directory: Path, *, verify: bool = True) -> dict[str, Any]:
    """Fills a fresh engine; returns the non-tensor state. Any layout may have written the checkpoint. Collective.

    ``verify``: compares its files with their checksums first."""
    state = read_state(directory)
    if state.get("weights_only"):
        raise ValueError(
            f"{directory} holds weights without an optimizer, so there is nothing to go on with: begin a new run from "
            "them by --init-from PATH"
        )
    slices = engine.owned_slices(create_moments=True)
    buffers = {f"model.{name}": buffer for name, buffer in gate_buffers(engine.module)}
    slices += [_whole(key, buffer) for key, buffer in buffers.items()]
    expected = _all_shapes(slices)
    generators = _generators(engine.groups)
    same_layout = state["layout"] == _layout(engine)
    if same_layout:
        own = [_whole(key, values) for key, values in generators.items()]
        slices += own
        expected |= _all_shapes(own)
    load(directory, slices, expected, verify=verify)
    if same_layout:
        _set_generators(engine.groups, generators)
    engine.refresh_parameters(state["optimizer_steps"])
    return state


def load_initial_weights(engine: Engine, directory: Path) -> None:
    """Fills a fresh engine's parameters and gate state from any checkpoint of the same geometry, imported or trained;
    step, moments, generators and what gates count by steps stay as they are at the start of a run. What the tensors do
    not say of a model is for training/initial.py to compare. Collective."""
    read_state(directory)  # which refuses what is damaged or of another version
    counters = step_counters(engine.module)
    slices = [owned for owned in engine.owned_slices() if owned.key.startswith("model.")]
    slices += [_whole(f"model.{name}", buffer) for name, buffer in gate_buffers(engine.module) if name not in counters]
    stored = {key: shape for key, shape in _stored_shapes(directory).items() if key.removeprefix("model.") in counters}
    # What is stored of counters may be there or not, and nobody reads it.
    load(directory, slices, _all_shapes(slices) | stored)
    engine.refresh_parameters(0)


def _stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Empty where it cannot be read: ``load`` says that, to all ranks alike. OSError where the disk is away, for
    ``load`` may find it back, and would take the checkpoint for that of another model."""
    try:
        with StoredTensors(directory) as stored:
            return dict(stored.shapes)
    except (OSError, ValueError) as error:
        if may_pass(error):
            raise
        return {}


def load_weights(model: nn.Module, groups: Groups, directory: Path) -> dict[str, Any]:
    """Fills a plain model (no engine) with the weights and gate state of a checkpoint. Collective where several
    processes run. Returns the non-tensor state."""
    state = read_state(directory)
    slices, copies = [], []
    for name, parameter in model.named_parameters():
        owned = parameter.detach().float().contiguous().cpu()
        copies.append((parameter, owned))
        if (shard := shard_of(parameter)) is not None:
            slices.append(OwnedSlice(f"model.{name}", shard.shape, 0, owned.view(-1), shard))
            continue
        slices.append(_slice_of(model, groups, name, owned))
    for name, buffer in gate_buffers(model):
        slices.append(_whole(f"model.{name}", buffer))
    load(directory, slices, _all_shapes(slices))
    with torch.no_grad():
        for parameter, owned in copies:
            parameter.copy_(owned)
    return state


def _slice_of(model: nn.Module, groups: Groups, name: str, local: Tensor) -> OwnedSlice:
    owner = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(owner, Experts):
        return _whole(f"model.{name}", local)
    experts = owner.num_local * groups.expert_size
    return OwnedSlice(f"model.{name}", (experts, *local.shape[1:]), owner.first * local[0].numel(), local.view(-1))


def _generators(groups: Groups) -> dict[str, Tensor]:
    """State of this rank's random number generators by name in a checkpoint, uint8 on the CPU."""
    states = {f"rng.{groups.rank}": torch.get_rng_state()}
    if groups.device.type == "cuda":
        states[f"rng.cuda.{groups.rank}"] = torch.cuda.get_rng_state(groups.device)
    return states


def _set_generators(groups: Groups, states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states[f"rng.{groups.rank}"])
    if groups.device.type == "cuda":
        torch.cuda.set_rng_state(states[f"rng.cuda.{groups.rank}"], groups.device)


def gate_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Gate state: persistent buffers, equal on all ranks."""
    persistent = module.state_dict().keys() - {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return sorted((name, buffer) for name, buffer in module.named_buffers() if name in persistent)


def step_counters(module: nn.Module) -> set[str]:
    """Names of the buffers in which gates count the optimizer steps of this run, whether or not its options make them:
    the same gate in another run may have them."""
    gates = [(name, gate) for name, gate in module.named_modules() if isinstance(gate, Gate)]
    return {f"{name}.{own}" for name, gate in gates for own, moves in gate.state_follows.items() if moves == "steps"}


def _gate_state(engine: Engine) -> list[OwnedSlice]:
    """Equal on all ranks, so that one writes it."""
    if dist.get_rank() != 0:
        return []
    return [_whole(f"model.{name}", buffer) for name, buffer in gate_buffers(engine.module)]


def _whole(key: str, tensor: Tensor) -> OwnedSlice:
    return OwnedSlice(key, tuple(tensor.shape), 0, tensor.detach().view(-1))


def _layout(engine: Engine) -> dict[str, Any]:
    groups = engine.groups
    layout: dict[str, Any] = {"processes": groups.world_size, "expert": groups.expert_size}
    if groups.tensor_size > 1:
        layout["tensor"] = groups.tensor_size
    return layout | {"zero_stage": engine.train.zero_stage, "device": groups.device.type}


def _all_shapes(slices: list[OwnedSlice]) -> dict[str, tuple[int, ...]]:
    """Shapes of everything that any rank wants: under ZeRO a rank may own nothing of a small tensor."""
    shapes = {owned.key: owned.shape for owned in slices}
    if dist.get_world_size() == 1:
        return shapes
    every: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, shapes)
    return {key: shape for part in every for key, shape in part.items()}
