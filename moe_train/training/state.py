"""What a checkpoint of a run holds, gathered from engine, gates and generators, and put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.checkpoint import store
from moe_train.checkpoint.slices import OwnedSlice
from moe_train.model.experts.module import Experts
from moe_train.parallel.groups import Groups
from moe_train.training.engine import Engine


def save_checkpoint(
    engine: Engine, root: Path, *, step: int, consumed: int, tokens: int, keep: int, config: dict[str, Any]
) -> Path:
    """Parameters and moments as float32 masters, gate state, generators, position. Collective."""
    slices = engine.owned_slices()
    if dist.get_rank() == 0:
        slices += [_whole(f"model.{name}", buffer) for name, buffer in _buffers(engine.module)]
    slices.append(_whole(f"rng.{dist.get_rank()}", torch.get_rng_state()))
    state = {
        "consumed_samples": consumed,
        "tokens": tokens,
        "optimizer_steps": engine.optimizer_steps(),
        "layout": _layout(engine),
        "config": config,
    }
    return store.save(root, step, slices, state, keep=keep)


def load_checkpoint(engine: Engine, directory: Path) -> dict[str, Any]:
    """Fills a fresh engine; returns the non-tensor state. Any layout may have written the checkpoint. Collective."""
    state = store.read_state(directory)
    slices = engine.owned_slices(create_moments=True)
    buffers = {f"model.{name}": buffer for name, buffer in _buffers(engine.module)}
    slices += [_whole(key, buffer) for key, buffer in buffers.items()]
    expected = _all_shapes(slices)
    rng = torch.get_rng_state()
    if state["layout"] == _layout(engine):
        slices.append(_whole(f"rng.{dist.get_rank()}", rng))
        expected |= {f"rng.{rank}": tuple(rng.shape) for rank in range(dist.get_world_size())}
    store.load(directory, slices, expected)
    torch.set_rng_state(rng)
    engine.refresh_parameters(state["optimizer_steps"])
    return state


def load_weights(model: nn.Module, groups: Groups, directory: Path) -> dict[str, Any]:
    """Fills a plain model (no engine) with the weights and gate state of a checkpoint. Collective where several
    processes run. Returns the non-tensor state."""
    state = store.read_state(directory)
    slices, copies = [], []
    for name, parameter in model.named_parameters():
        owned = parameter.detach().float().contiguous().cpu()
        copies.append((parameter, owned))
        slices.append(_slice_of(model, groups, name, owned))
    for name, buffer in _buffers(model):
        slices.append(_whole(f"model.{name}", buffer))
    store.load(directory, slices, _all_shapes(slices))
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


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Gate state: persistent buffers, equal on all ranks."""
    persistent = module.state_dict().keys() - {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return sorted((name, buffer) for name, buffer in module.named_buffers() if name in persistent)


def _whole(key: str, tensor: Tensor) -> OwnedSlice:
    return OwnedSlice(key, tuple(tensor.shape), 0, tensor.detach().view(-1))


def _layout(engine: Engine) -> dict[str, int]:
    groups = engine.groups
    return {"processes": groups.world_size, "expert": groups.expert_size, "zero_stage": engine.train.zero_stage}


def _all_shapes(slices: list[OwnedSlice]) -> dict[str, tuple[int, ...]]:
    """Shapes of everything that any rank wants: under ZeRO a rank may own nothing of a small tensor."""
    shapes = {owned.key: owned.shape for owned in slices}
    if dist.get_world_size() == 1:
        return shapes
    every: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, shapes)
    return {key: shape for part in every for key, shape in part.items()}
