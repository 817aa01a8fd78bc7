"""Flat ranges of a tensor as boxes, against counting by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from moe_train.checkpoint.slices import OwnedSlice, boxes, cut
from moe_train.parallel.shard import Shard

SHAPES = [(7,), (1,), (3, 4), (4, 1), (1, 5), (2, 3, 4), (3, 1, 2), (1, 1, 1), (2, 2, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_range_of_every_shape(shape: tuple[int, ...]) -> None:
    """Each box is inside the tensor, and together, in order, they are the range: every element once."""
    size = math.prod(shape)
    index = torch.arange(size).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(size + 1), 2):
        pieces = list(boxes(shape, start, stop - start))
        elements = []
        for offsets, sizes in pieces:
            assert len(offsets) == len(sizes) == len(shape)
            assert all(s >= 1 and o >= 0 and o + s <= n for o, s, n in zip(offsets, sizes, shape, strict=True))
            where = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            elements += index[where].flatten().tolist()
        assert elements == list(range(start, stop))
        assert len(pieces) <= 2 * len(shape) - 1


def test_a_number_and_nothing() -> None:
    assert list(boxes((), 0, 1)) == [((), ())]
    assert list(boxes((), 0, 0)) == list(boxes((3, 4), 5, 0)) == []


def test_a_whole_tensor_is_one_box() -> None:
    assert list(boxes((3, 4, 5), 0, 60)) == [((0, 0, 0), (3, 4, 5))]


@pytest.mark.parametrize(("start", "length"), [(0, 24), (5, 13), (23, 1), (1, 22)])
def test_cut_gives_views_of_the_right_elements(start: int, length: int) -> None:
    whole = torch.randn(2, 3, 4)
    data = whole.flatten()[start : start + length].clone()
    for box in cut(OwnedSlice("name", (2, 3, 4), start, data)):
        where = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.data.shape, strict=True))
        assert torch.equal(box.data, whole[where])
        assert (box.key, box.shape) == ("name", (2, 3, 4))
        box.data.zero_()
    assert not data.any(), "writing into the boxes did not reach the owner's memory"


SHARDS = [
    Shard((4, 3), 0, ((2, 2),)),
    Shard((12, 2), 0, ((2, 2), (8, 2))),
    Shard((3, 8), 1, ((4, 4),)),
    Shard((2, 6, 2), 1, ((1, 2), (4, 1))),
    Shard((9,), 0, ((0, 1), (3, 2), (8, 1))),
]


@pytest.mark.parametrize("shard", SHARDS, ids=str)
def test_every_range_of_a_part_is_found_in_the_global_tensor(shard: Shard) -> None:
    whole = torch.randn(shard.shape)
    part = shard.take(whole)
    assert part.shape == shard.local_shape
    for start, stop in itertools.combinations_with_replacement(range(part.numel() + 1), 2):
        data = part.flatten()[start:stop].clone()
        found = cut(OwnedSlice("name", shard.shape, start, data, shard))
        for box in found:
            where = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.data.shape, strict=True))
            assert torch.equal(box.data, whole[where]) and box.shape == shard.shape
            box.data.zero_()
        assert not data.any() and sum(box.data.numel() for box in found) == stop - start
