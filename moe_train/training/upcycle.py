"""A run with a dense model -> the folder of a run with experts, tensor by tensor: what interop/upcycle.py plans."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from moe_train.checkpoint.reading import StoredTensors
from moe_train.checkpoint.state import read_state_with_config
from moe_train.checkpoint.store import checkpoint_at
from moe_train.checkpoint.streaming import untrained_state, write_weights
from moe_train.checkpoint.writing import LazyBox
from moe_train.data.files import write_atomically
from moe_train.interop.importing import RECORD
from moe_train.interop.shapes import Shapes, weight_shapes
from moe_train.interop.small_files import copy_tokenizer
from moe_train.interop.upcycle import UpcycleOptions, Upcycling, plan
from moe_train.interop.whole_folder import check_target, whole_folder
from moe_train.routing.options import RouterOptions
from moe_train.training import run_folder
from moe_train.training.account import active_parameters, parameters
from moe_train.training.convert import HUB, RUN_FOLDERS, UPCYCLED, Report
from moe_train.training.run_config import check, from_dict, to_dict, to_yaml


def upcycle_model(
    path: Path,
    out: Path,
    router: RouterOptions,
    options: UpcycleOptions,
    *,
    step: int | None = None,
    force: bool = False,
) -> Report:
    """Writes OUT, a run's folder with a checkpoint of weights at step 0 that computes what the dense model computes.

    Errors: ValueError where the plan cannot keep its output, or ``path`` holds no dense model; OSError.
    """
    check_target(out, force=force, ours=_is_upcycled, what="an upcycled model", folders=RUN_FOLDERS)
    directory = checkpoint_at(path, step)
    state = read_state_with_config(directory)
    dense = from_dict(state["config"], source=f"{directory}/state.json")
    found = plan(dense.model, router, options)
    config = dataclasses.replace(dense, name=out.resolve().name, model=found.model, router=found.router)
    check(config, source="the upcycled model")
    run = directory.resolve().parents[1]
    with StoredTensors(directory) as stored, whole_folder(out) as temporary:
        write_atomically(temporary / run_folder.CONFIG, to_yaml(config).encode())
        write_atomically(temporary / UPCYCLED, f"{run}, step {state['step']}\n".encode())
        copy_tokenizer(run, temporary)
        if (run / HUB).is_dir():
            shutil.copytree(run / HUB, temporary / HUB, ignore=shutil.ignore_patterns(RECORD))
        boxes = list(_boxes(stored, found, weight_shapes(found.model, found.router)))
        write_weights(temporary / run_folder.CHECKPOINTS, 0, boxes, untrained_state(to_dict(config)))
    total, active = parameters(config).total, active_parameters(config)
    summary = f"{out}: {found.model.family}, {total:,} parameters, {active:,} of them active; "
    notes = [] if options.noise else ["its output is that of the dense model until it is trained"]
    return Report(summary + f"from {parameters(dense).total:,}", notes)


def _is_upcycled(folder: Path) -> bool:
    return (folder / UPCYCLED).is_file() and not (folder / run_folder.METRICS).exists()


def _boxes(stored: StoredTensors, found: Upcycling, shapes: Shapes) -> Iterator[LazyBox]:
    """Errors: ValueError where the checkpoint lacks something."""
    made = dict(found.tensors())
    for name, shape in shapes.items():
        key, start = f"model.{name}", (0,) * len(shape)
        if name in made:
            dtype = found.dtype(name, stored.dtypes[f"model.{name.partition('.mlp.')[0]}.mlp.weight2"])
            yield LazyBox(key, shape, start, shape, dtype, _Made(stored, made[name], dtype))
        elif stored.shapes.get(key) != shape:
            raise ValueError(f"checkpoint {stored.directory} holds {key} as {stored.shapes.get(key)}, not as {shape}")
        else:
            yield LazyBox(key, shape, start, shape, stored.dtypes[key], _Kept(stored, key))


@dataclasses.dataclass(frozen=True)
class _Kept:
    stored: StoredTensors
    key: str

    def __call__(self) -> Tensor:
        shape = self.stored.shapes[self.key]
        values = torch.empty(shape, dtype=self.stored.dtypes[self.key])
        self.stored.read(self.key, (0,) * len(shape), values)
        return values


@dataclasses.dataclass(frozen=True)
class _Made:
    stored: StoredTensors
    make: Callable[[Callable[[str], Tensor]], Tensor]
    dtype: torch.dtype

    def __call__(self) -> Tensor:
        return self.make(lambda name: _Kept(self.stored, f"model.{name}")()).to(self.dtype).contiguous()
