"""A rank's part of a named global tensor, and how a flat part is cut into N-dimensional boxes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class OwnedSlice:
    """``data`` (flat, contiguous) is elements [start, start + data.numel()) of the flattened global tensor ``key``."""

    key: str
    shape: tuple[int, ...]
    start: int
    data: Tensor


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
    result, position = [], 0
    for offsets, sizes in boxes(owned.shape, owned.start, owned.data.numel()):
        length = 1
        for size in sizes:
            length *= size
        result.append(Box(owned.key, owned.shape, offsets, owned.data[position : position + length].view(sizes)))
        position += length
    return result
