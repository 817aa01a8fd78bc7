"""What an engine holds in memory on each rank of a pool."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from moe_train.model.micro_batch import MicroBatch, use
from moe_train.model.recompute import RecomputedLayer
from moe_train.training.engine import Engine
from moe_train.training.state import run_slices
from moe_train.training.step import token_batch
from tests.distributed.harness.training import (
    Case,
    build_model,
    groups_of,
    make_engine,
    micro_batches_of,
    one_step,
)


def optimizer_storage(case: Case) -> dict[str, Any]:
    """After ``case.steps``: types of masters and moments, and bytes that they share with the module's parameters."""
    engine = make_engine(case, groups_of(case))
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


def held(case: Case) -> dict[str, int]:
    """Bytes of this rank in the second step, after the backward pass of its first micro-batch; ``bucket`` and
    ``whole`` (elements of ZeRO 3 that are whole) are the most of the step, ``save_copy`` is what a save
    after it takes."""
    engine = make_engine(case, groups_of(case))
    one_step(engine, case, 0)
    found: dict[str, int] = {"bucket": 0, "whole": 0}
    zero = engine.zero

    def before(method: Callable[[], Any]) -> Callable[[], Any]:
        def looked() -> Any:
            if "gradients" not in found:
                found["gradients"] = total(gradient_tensors(engine))
                found["host"] = total(host_tensors(engine)) if case.offload else 0
            return method()

        return looked

    def look_at_buckets(*_: Any) -> None:
        buckets = [bucket.buffer for bucket in zero.ipg_buckets.values()]
        tensors = [x for buffer in buckets for x in (buffer if isinstance(buffer, list) else [buffer])]
        found["bucket"] = max(found["bucket"], total([x for x in tensors if x is not None]))
        if case.zero == 3:
            there = [p for p in engine.module.parameters() if p.ds_status.name == "AVAILABLE"]
            found["whole"] = max(found["whole"], sum(p.ds_numel for p in there))

    for parameter in engine.module.parameters():
        parameter.register_hook(look_at_buckets)
    engine.next_micro_batch = before(engine.next_micro_batch)  # type: ignore[method-assign]
    engine.measure_gradients = before(engine.measure_gradients)  # type: ignore[method-assign]
    one_step(engine, case, 1)
    found["parameters"], found["optimizer"] = total(parameter_tensors(engine)), total(optimizer_tensors(engine))
    # States of random number generators have the same few kilobytes in any model.
    found["save_copy"] = sum(owned.data.nbytes for owned in run_slices(engine) if not owned.key.startswith("rng."))
    engine.close()
    return found


def total(tensors: list[Tensor]) -> int:
    """Bytes of all storages."""
    return sum(storages(tensors).values())


def gradient_tensors(engine: Engine) -> list[Tensor]:
    """Where gradients are accumulated between micro-batches."""
    zero = engine.zero
    if engine.train.zero_stage == 3:
        return [zero.grad_partitions_flat_buffer]
    if engine.train.zero_stage == 2:
        return _tensors([zero.all_grad_tensors, zero.averaged_gradients])
    return [g for p in engine.module.parameters() for g in (p.grad, getattr(p, "grad_accum", None)) if g is not None]


def host_tensors(engine: Engine) -> list[Tensor]:
    """What an offloaded optimizer keeps in host memory."""
    zero, stepped = engine.zero, optimizer_tensors(engine)
    gradients = [x.grad for x in stepped if x.grad is not None]
    way = [zero.grad_partitions_flat_buffer] if engine.train.zero_stage == 3 else []
    return [*stepped, *gradients, *way, *getattr(zero, "param_buffer_of_bit16_for_cpu_offload_groups", [])]


def _tensors(value: Any) -> list[Tensor]:
    """In nested lists and dictionaries."""
    if torch.is_tensor(value):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for item in value for x in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [x for x in (*args, kwargs.get("hidden_states")) if torch.is_tensor(x)]


def activation_bytes(case: Case) -> int:
    """Of all storages that the graph of one training pass of this rank holds, parameters left out. Inputs of layers
    that are computed again hang on the graph without being saved tensors of it: those that are alive count."""
    groups = groups_of(case)
    model = build_model(case).train()
    own = storages([p.data for p in model.parameters()])
    [batch] = micro_batches_of(case, groups, 0)
    totals = {name: torch.tensor(1.0) for name in ("target", "token", "sequence", "micro_batch", "multi_token")}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept.update(storages([x]))
        return x

    inputs: list[weakref.ref[Tensor]] = []
    for layer in (module for module in model.modules() if isinstance(module, RecomputedLayer)):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: inputs.extend(weakref.ref(x) for x in _hidden(args, kwargs)), with_kwargs=True
        )
    with saved_tensors_hooks(pack, lambda x: x), use(MicroBatch(token_batch(batch, groups.device), totals)):
        loss, _ = model(batch.ids_BS, batch.labels_BS, batch.target_BS)
    assert loss.requires_grad
    kept.update(storages([x for ref in inputs if (x := ref()) is not None]))
    return sum(size for place, size in kept.items() if place not in own)
