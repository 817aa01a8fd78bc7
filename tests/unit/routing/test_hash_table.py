from __future__ import annotations

import json
import random

import pytest
import torch

from moe_train.routing.gates.hash_table import counted_table, even_table, read_counts


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("ids", "k", "experts"), [(101, 1, 8), (64, 3, 8), (5, 2, 8), (1000, 8, 8), (0, 2, 4), (7, 1, 1)]
)
def test_even_over_ids(ids, k, experts, fresh_seed):
    table_VK = even_table(ids, k, experts, generator(fresh_seed))
    assert table_VK.shape == (ids, k) and table_VK.dtype == torch.int64
    assert all(len(set(row)) == k for row in table_VK.tolist())
    load = [int((table_VK == e).sum()) for e in range(experts)]
    assert max(load) - min(load) <= k and sum(load) == ids * k


def test_even_tables_differ_and_repeat():
    one, again, other = (even_table(200, 2, 8, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    neighbours = (one[1:, 0] - one[:-1, 0]).unique()
    assert len(neighbours) > 8  # no order of the ids is left in it


def greedy(counts, k, experts):
    """Loads after giving id by id, from the most frequent on, to the k least loaded experts."""
    load = [0] * experts
    for count in sorted(counts, reverse=True):
        for expert in sorted(range(experts), key=lambda e: load[e])[:k]:
            load[expert] += count
    return sorted(load)


@pytest.mark.parametrize(("k", "experts"), [(1, 4), (2, 5), (3, 3)])
def test_most_frequent_first_to_the_least_loaded(k, experts, fresh_seed):
    draw = random.Random(fresh_seed)
    counts = [int(draw.paretovariate(1.0)) * draw.randrange(2) for _ in range(300)] + [1]
    table = counted_table(counts, k, experts, generator(fresh_seed)).tolist()
    assert all(len(set(row)) == k and 0 <= min(row) and max(row) < experts for row in table)
    load = [sum(count for row, count in zip(table, counts, strict=True) if e in row) for e in range(experts)]
    assert sorted(load) == greedy(counts, k, experts)
    unseen = [row for row, count in zip(table, counts, strict=True) if not count]
    ids = [sum(e in row for row in unseen) for e in range(experts)]
    assert max(ids) - min(ids) <= k


def test_reading_counts(tmp_path):
    path = tmp_path / "counts.json"
    path.write_text("[3, 0, 5]")
    assert read_counts(str(path), 5) == [3, 0, 5, 0, 0]
    with pytest.raises(ValueError, match="counts 3 token ids, but vocab_size is 2"):
        read_counts(str(path), 2)
    for wrong in ({"a": 1}, [1, -1], [1.5], [True], [0, 0], []):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="a JSON list of whole numbers"):
            read_counts(str(path), 5)
    path.write_text("[1, 2")
    with pytest.raises(ValueError, match=r"is not JSON.*--token-counts"):
        read_counts(str(path), 5)
