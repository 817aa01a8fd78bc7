"""A checkpoint of ours -> safetensors files of the hub, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_train.checkpoint.reading import StoredTensors
from moe_train.data.files import write_atomically
from moe_train.interop.hub_folder import INDEX, SINGLE
from moe_train.interop.layout import HubTensor, Layout
from moe_train.interop.safetensors_file import write_file


@dataclass(frozen=True)
class Written:
    tensors: int
    values: int
    files: list[str]


def check_stored(stored: StoredTensors, layout: Layout, left_out: str | None = None) -> None:
    """Errors: ValueError that names what the checkpoint has more, less or otherwise than the configuration, but for
    names that begin with ``left_out``."""
    have = {key: shape for key, shape in stored.shapes.items() if key.startswith("model.")}
    if left_out is not None:
        have = {key: shape for key, shape in have.items() if not key.startswith(f"model.{left_out}")}
    want = {f"model.{name}": shape for name, shape in layout.shapes.items()}
    problems = [f"missing: {key}" for key in sorted(want.keys() - have.keys())]
    problems += [f"has no place: {key}" for key in sorted(have.keys() - want.keys())]
    problems += [
        f"{key} has shape {have[key]}, expected {want[key]}" for key in sorted(have.keys() & want.keys())
        if have[key] != want[key]
    ]  # fmt: skip
    if problems:
        more = [f"… and {len(problems) - 10} more"] if problems[10:] else []
        raise ValueError(f"checkpoint {stored.directory} is of another model:\n  " + "\n  ".join(problems[:10] + more))


def write_tensors(
    stored: StoredTensors,
    layout: Layout,
    folder: Path,
    *,
    dtype: Callable[[str, torch.dtype], torch.dtype],
    copies: list[str],
    shard_bytes: int,
) -> Written:
    """Writes all tensors, in files of at most ``shard_bytes`` where a tensor is not larger itself, and their index.

    ``dtype``: of a weight of that name which is stored in that type. ``copies``: names of those that may be left out
    and shall not be. Errors: OSError, ValueError for a damaged checkpoint.
    """
    tensors = {tensor.name: tensor for tensor in layout.tensors}
    tensors |= {c.hub: tensors[c.of] for c in layout.copies if not c.optional or c.hub in copies}
    plan = {}
    for name, tensor in tensors.items():
        kept = _state_dtype(stored, layout, tensor)
        plan[name] = (kept or dtype(name, stored.dtypes[f"model.{tensor.pieces[0].key}"]), tensor.shape)
    sizes = {name: math.prod(shape) * kind.itemsize for name, (kind, shape) in plan.items()}
    shards = _shards(sizes, shard_bytes)
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        write_file(folder / file, {n: plan[n] for n in names}, lambda n: _tensor(stored, tensors[n], plan[n][0]))
    values = sum(math.prod(shape) for _, shape in plan.values())
    if len(shards) > 1:
        index = {
            "metadata": {"total_parameters": values, "total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        write_atomically(folder / INDEX, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
    return Written(len(plan), values, files)


def _state_dtype(stored: StoredTensors, layout: Layout, tensor: HubTensor) -> torch.dtype | None:
    """Of what is no weight and keeps its type; None for weights."""
    if not tensor.pieces:
        return torch.float32  # a selection bias that was never switched on
    key = tensor.pieces[0].key
    return stored.dtypes[f"model.{key}"] if key in layout.states else None


def _shards(sizes: dict[str, int], largest: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > largest:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _tensor(stored: StoredTensors, tensor: HubTensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(tensor.shape, dtype=dtype) if tensor.pieces else torch.zeros(tensor.shape, dtype=dtype)
    for piece in tensor.pieces:
        rows = out[piece.first : piece.stop] if tensor.shape else out
        stored.read(f"model.{piece.key}", piece.offsets, rows.view(piece.sizes))
    return out
