"""A model folder of the hub -> a checkpoint of ours, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_train.checkpoint.streaming import untrained_state, write_weights
from moe_train.checkpoint.writing import LazyBox
from moe_train.data.files import write_atomically
from moe_train.interop.accounting import Account, Stored, account
from moe_train.interop.config_import import HubModel, from_hub
from moe_train.interop.fp8 import SCALE, dequantized_rows
from moe_train.interop.hub_folder import CONFIG, read_config, tensors_of
from moe_train.interop.layout import Layout, Piece, lay_out

RECORD = "import.json"
"""In OUT/hf: what of the source its tensors do not say."""


@dataclass(frozen=True)
class Source:
    """A model folder, checked to the last tensor; nothing was written yet."""

    folder: Path
    hub: HubModel
    layout: Layout
    stored: Stored
    account: Account

    @property
    def dtype(self) -> torch.dtype:
        """Of most of the values, as they are stored on our side."""
        counts: dict[torch.dtype, int] = {}
        for tensor in self.stored.values():
            dtype = torch.bfloat16 if tensor.dtype.itemsize == 1 else tensor.dtype
            counts[dtype] = counts.get(dtype, 0) + tensor.nbytes
        return max(counts, key=lambda dtype: counts[dtype])

    def notes(self) -> list[str]:
        """What the user should know, one sentence each."""
        found = []
        if self.account.scales:
            found.append(f"{len(self.account.scales)} tensors in 8-bit blocks are dequantised to bfloat16")
        next_layer = f"model.layers.{self.hub.model.num_layers}."
        if self.hub.model.multi_token.layers:
            found.append(f"{next_layer}* is kept as the layer of multi-token prediction (transformers leaves it out)")
        elif any(name.startswith(next_layer) for name in self.account.left_out):
            found.append(f"{next_layer}*, the layer of multi-token prediction, is left out as asked")
        elif self.hub.multi_token_layers:
            found.append("config.json speaks of multi-token prediction, but no file holds it: imported without")
        computed = [name for name in self.account.left_out if not name.startswith(next_layer)]
        if computed:
            found.append(f"{len(computed)} tensors that follow from config.json are left out ({computed[0]}, …)")
        return found


def open_source(folder: Path, *, drop_multi_token: bool = False) -> Source:
    """Reads config.json and the headers of the weights, and accounts for every tensor.

    ``drop_multi_token``: leave DeepSeek's layer of multi-token prediction out. It is left out as well where no file
    holds it, as in what transformers writes.
    Errors: ValueError that says what is wrong with the folder, or what our models cannot do.
    """
    config, stored = read_config(folder), tensors_of(folder)
    hub = _described(folder, config)
    next_layer = f"model.layers.{hub.model.num_layers}."
    if drop_multi_token or not any(name.startswith(next_layer) for name in stored):
        hub = _described(folder, config, multi_token=False)
    layout = layout_of(hub, f"{folder / CONFIG}, as our options")
    drop = next_layer if drop_multi_token else None
    return Source(folder, hub, layout, stored, account(stored, layout, folder, quantized=hub.quantized, drop=drop))


def _described(folder: Path, config: dict[str, Any], multi_token: bool = True) -> HubModel:
    """``from_hub`` with errors that name the file, not only its name."""
    try:
        return from_hub(config, multi_token=multi_token)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {str(error).removeprefix(f'{CONFIG}: ')}") from error


def layout_of(hub: HubModel, source: str) -> Layout:
    """Errors: ValueError that begins with ``source`` where the values do not fit each other."""
    try:
        return lay_out(hub.model, hub.router)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def write_checkpoint(source: Source, root: Path, config: dict[str, Any]) -> Path:
    """Writes root/step_00000000 and root/latest in the types of the files; ``config``: the run's, for its state."""
    return write_weights(root, 0, _boxes(source), untrained_state(config))


def write_record(source: Source, folder: Path) -> None:
    """What an export needs to write the same tensors again."""
    content = {
        "copies": [copy.hub for copy in source.account.copies],
        "left_out": source.account.left_out,
        "dequantised": bool(source.account.scales),
    }
    write_atomically(folder / RECORD, json.dumps(content, indent=1).encode())


def _boxes(source: Source) -> Iterator[LazyBox]:
    """In the order of the files, so that they are read from the beginning to the end."""
    shapes = source.layout.shapes
    for name in source.stored:
        tensor = source.account.weights.get(name)
        for piece in tensor.pieces if tensor is not None else ():
            dtype = torch.bfloat16 if name + SCALE in source.account.scales else source.stored[name].dtype
            yield LazyBox(
                f"model.{piece.key}", shapes[piece.key], piece.offsets, piece.sizes, dtype, _Rows(source, name, piece)
            )
    names = {tensor.pieces[0].key: tensor.name for tensor in source.layout.tensors if tensor.pieces}
    for key, first in source.layout.padding:
        shape, dtype = shapes[key], source.stored[names[key]].dtype
        sizes = (shape[0] - first, *shape[1:])
        yield LazyBox(f"model.{key}", shape, (first, *(0,) * len(shape[1:])), sizes, dtype, _Zeros(sizes, dtype))


@dataclass(frozen=True)
class _Rows:
    source: Source
    name: str
    piece: Piece

    def __call__(self) -> Tensor:
        stored, scale = self.source.stored, self.name + SCALE
        if scale in self.source.account.scales:
            return dequantized_rows(stored[self.name], stored[scale], self.piece.first, self.piece.stop)
        return stored[self.name].rows(self.piece.first, self.piece.stop)


@dataclass(frozen=True)
class _Zeros:
    sizes: tuple[int, ...]
    dtype: torch.dtype

    def __call__(self) -> Tensor:
        return torch.zeros(self.sizes, dtype=self.dtype)
