"""Which part of a named global tensor a parameter of this rank is, where tensor parallelism divides it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """Along ``dim`` the part holds these pieces of the global tensor, one behind the other; it is whole along the other
    dimensions."""

    shape: tuple[int, ...]
    """Of the global tensor."""
    dim: int
    pieces: tuple[tuple[int, int], ...]
    """(first index, number of indices) in the global tensor."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of the part."""
        return (*self.shape[: self.dim], sum(size for _, size in self.pieces), *self.shape[self.dim + 1 :])

    def take(self, whole: Tensor) -> Tensor:
        """The part of a global tensor, as a copy."""
        return torch.cat([whole.narrow(self.dim, first, size) for first, size in self.pieces], dim=self.dim)


def divide(parameter: Tensor, dim: int, group: Any, parts: int = 1) -> None:
    """Notes that a parameter is this rank's part of a tensor that the ranks of ``group`` share.

    Along ``dim`` the global tensor has so many equal ``parts``, each of which is divided among the ranks in their
    order. Of one rank nothing is noted: the parameter is the tensor.
    """
    ranks, rank = group.size(), group.rank()
    if ranks == 1:
        return
    size = parameter.shape[dim] // parts
    assert size * parts == parameter.shape[dim], "a parameter holds equal pieces of all parts"
    shape = (*parameter.shape[:dim], parameter.shape[dim] * ranks, *parameter.shape[dim + 1 :])
    pieces = tuple((part * ranks * size + rank * size, size) for part in range(parts))
    parameter.shard = Shard(shape, dim, pieces)  # type: ignore[attr-defined]


def shard_of(parameter: Tensor) -> Shard | None:
    """What `divide` has noted; None for a parameter that no ranks share."""
    return getattr(parameter, "shard", None)
