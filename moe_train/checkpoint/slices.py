"""A rank's part of a named global tensor, and how a flat part is cut into N-dimensional boxes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from moe_train.parallel.shard import Shard


@dataclass(frozen=True)
class OwnedSlice:
    """``data`` (flat, contiguous) is elements [start, start + data.numel()) of the flattened global tensor ``key``, or
    of the flattened part of it that ``shard`` describes."""

    key: str
    shape: tuple[int, ...]
    start: int
    data: Tensor
    shard: Shard | None = None


def boxes(shape: tuple[int, ...], start: int, length: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cuts the flat range [start, start + length) of a tensor into boxes (offsets, sizes), in flat order.

    At most 2 * len(shape) - 1 of them: rows of the innermost dimension at both ends, larger blocks between.
    """
    if length <= 0:
        return
    if len(shape) == 0:
        yield (), ()
        return
    inner = 1
    for size in shape[1:]:
        inner *= size
    end = start + length
    first, last = start // inner, end // inner
    if first * inner < start or last == first:
        # The range begins inside row `first` of the outermost dimension (or does not fill it).
        stop = min(end, (first + 1) * inner)
        for offsets, sizes in boxes(shape[1:], start - first * inner, stop - start):
            yield (first, *offsets), (1, *sizes)
        first += 1
        if stop == end:
            return
    if last > first:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    if last * inner < end:
        for offsets, sizes in boxes(shape[1:], 0, end - last * inner):
            yield (last, *offsets), (1, *sizes)


@dataclass(frozen=True)
class Box:
    """An N-dimensional part of the global tensor ``key``; ``data`` is a view into the owner's memory."""

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: Tensor


def cut(owned: OwnedSlice) -> list[Box]:
    """The boxes of a flat slice, as views of its data."""
    result: list[Box] = []
    position = 0
    shape = owned.shape if owned.shard is None else owned.shard.local_shape
    for offsets, sizes in boxes(shape, owned.start, owned.data.numel()):
        length = 1
        for size in sizes:
            length *= size
        box = Box(owned.key, owned.shape, offsets, owned.data[position : position + length].view(sizes))
        result += [box] if owned.shard is None else _placed(box, owned.shard)
        position += length
    return result


def _placed(box: Box, shard: Shard) -> Iterator[Box]:
    """A box of a part, cut where one piece of the part ends, with offsets in the global tensor."""
    dim, before = shard.dim, 0
    start, stop = box.offsets[dim], box.offsets[dim] + box.data.shape[dim]
    for first, size in shard.pieces:
        low, high = max(start, before), min(stop, before + size)
        if low < high:
            offsets = (*box.offsets[:dim], first + low - before, *box.offsets[dim + 1 :])
            yield Box(box.key, box.shape, offsets, box.data.narrow(dim, low - start, high - low))
        before += size
