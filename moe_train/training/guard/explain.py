"""Where bad numbers come from, found out only when a step has them: ranks, parameters, documents."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_train.data.dataset import sidecar_stem
from moe_train.data.domains import documents_path
from moe_train.data.origins import Origins
from moe_train.data.provenance import trace
from moe_train.data.training_set import TrainingSet
from moe_train.training.engine import Engine

SHOWN = 8
"""Documents and ranks that a line of text names."""


@dataclass(frozen=True)
class Place:
    ranks: list[int] = field(default_factory=list)
    """Data-parallel ranks whose own loss is not finite."""
    parameters: list[str] = field(default_factory=list)
    """Whose gradient is not finite, the one nearest to the model's output first: where the backward pass met it
    first."""


def place_of(engine: Engine, own_loss: float) -> Place:
    """Collective. ``own_loss``: of this rank."""
    mine = (math.isfinite(own_loss), engine.not_finite())
    every: list[Any] = [None] * engine.groups.world_size
    dist.all_gather_object(every, mine)
    order = {name: number for number, name in enumerate(engine.names.values())}
    names = {name for _, found in every for name in found}
    return Place(
        # Neighbours share tensors and read the same samples.
        ranks=sorted({rank // engine.groups.tensor_size for rank, (finite, _) in enumerate(every) if not finite}),
        parameters=sorted(names, key=lambda name: -order[name]),
    )


@dataclass(frozen=True)
class Documents:
    """What a step read."""

    numbers: dict[str, list[int]] = field(default_factory=dict)
    """By data set: the documents, as `moe-train inspect NAME --document N` counts them."""
    ids: dict[str, list[str]] = field(default_factory=dict)
    """Those that the sources gave them, in the same order; of data sets that keep a table of them."""


def documents_of(samples: TrainingSet, indices: Iterable[int]) -> Documents:
    """The documents of samples of a run. Errors: OSError, ValueError where the data cannot be read any more."""
    found: dict[str, set[int]] = {}
    for index in indices:
        read = trace(samples, index)
        found.setdefault(read.name, set()).update(piece.document for piece in read.pieces)
    numbers = {name: sorted(found[name]) for name in sorted(found)}
    ids = {}
    for name, documents in numbers.items():
        if documents_path(sidecar_stem(name)).is_file():
            origins = Origins(sidecar_stem(name))
            ids[name] = [origins[number].id for number in documents]
    return Documents(numbers, ids)


def text_of(place: Place, documents: Documents) -> str:
    """One line, of the first of each."""
    parts = []
    if place.ranks:
        parts.append(f"the loss is not finite on data-parallel rank {_first(place.ranks)}")
    if place.parameters:
        more = f" and in {len(place.parameters) - 1} more" if len(place.parameters) > 1 else ""
        parts.append(f"gradients are not finite in {place.parameters[0]}{more}")
    for name, numbers in documents.numbers.items():
        parts.append(f"documents of {Path(name).name}: {_first(numbers)}")
    return "; ".join(parts)


def _first(values: list[int]) -> str:
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return ", ".join(map(str, values[:SHOWN])) + more
