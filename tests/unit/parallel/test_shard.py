"""Parts of a tensor that ranks share: together they are the tensor, each element once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from moe_train.parallel.shard import divide, shard_of


@dataclass
class Ranks:
    """Stands for a process group."""

    ranks: int
    own: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.own


@pytest.mark.parametrize(
    ("shape", "dim", "parts"), [((12, 3), 0, 1), ((12, 3), 0, 2), ((3, 12), 1, 1), ((12, 2), 0, 3)]
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_make_up_the_tensor(shape: tuple[int, ...], dim: int, parts: int, ranks: int) -> None:
    whole_shape = (*shape[:dim], shape[dim] * ranks, *shape[dim + 1 :])
    whole = torch.arange(torch.Size(whole_shape).numel()).view(whole_shape)
    seen = []
    for rank in range(ranks):
        parameter = torch.nn.Parameter(torch.empty(shape))
        divide(parameter, dim, Ranks(ranks, rank), parts)
        shard = shard_of(parameter)
        assert shard is not None and shard.shape == whole_shape and shard.local_shape == shape
        part = shard.take(whole)
        # Of each part of the tensor an equal share, in the order of the ranks.
        for own, every in zip(part.chunk(parts, dim), whole.chunk(parts, dim), strict=True):
            assert torch.equal(own, every.chunk(ranks, dim)[rank])
        seen += part.flatten().tolist()
    assert sorted(seen) == list(range(whole.numel()))


def test_one_rank_has_the_tensor() -> None:
    parameter = torch.nn.Parameter(torch.empty(4, 2))
    divide(parameter, 0, Ranks(1, 0))
    assert shard_of(parameter) is None
