from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_train.data.batches import Batch
from moe_train.evaluation.batch_average import BatchAverage


def batch_of(samples: list[int], lengths: list[int], width: int) -> Batch:
    target = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    nothing = torch.zeros(len(samples), width, dtype=torch.int64)
    return Batch(nothing, nothing, target, ~target, torch.tensor(samples))


@pytest.mark.parametrize("batch_documents", [1, 3, 4, 50])
def test_average_of_batch_means(batch_documents: int) -> None:
    """Against the definition, with documents spread over two ranks and padding that holds NaN."""
    rng = np.random.default_rng(51)
    index = np.sort(rng.choice(100, 14, replace=False))
    lengths = rng.integers(1, 9, len(index))
    nll = [rng.random(length) * 5 for length in lengths]
    ranks = [BatchAverage(index, batch_documents, "cpu") for _ in range(2)]
    for start in range(0, 16, 2):
        rows = list(range(start, min(start + 2, 14))) + [None] * max(0, start + 2 - 14)
        values = torch.full((2, 9), float("nan"))
        for place, row in enumerate(rows):
            if row is not None:
                values[place, : lengths[row]] = torch.from_numpy(nll[row]).float()
        samples = [-1 if row is None else int(index[row]) for row in rows]
        widths = [0 if row is None else int(lengths[row]) for row in rows]
        ranks[start // 2 % 2].add(batch_of(samples, widths, 9), values)
    total, weight = 0.0, 0
    for start in range(0, 14, batch_documents):
        together = nll[start : start + batch_documents]
        total += np.concatenate(together).astype(np.float32).mean(dtype=np.float64) * len(together)
        weight += len(together)
    sums = iter([ranks[0]._nll_G + ranks[1]._nll_G, ranks[0]._targets_G + ranks[1]._targets_G])
    assert ranks[0].loss(lambda _: next(sums)) == pytest.approx(total / weight, rel=1e-6)


def test_a_batch_without_targets_is_left_out() -> None:
    average = BatchAverage(np.arange(4), 2, "cpu")
    average.add(batch_of([0, 1], [0, 0], 3), torch.ones(2, 3))
    average.add(batch_of([2, 3], [3, 1], 3), torch.tensor([[1.0, 2.0, 3.0], [6.0, 9.0, 9.0]]))
    assert average.loss(lambda x: x) == 3.0
    assert average.to_json(3.0)["perplexity_batch_average"] == pytest.approx(np.exp(3.0))


def test_watching_changes_nothing() -> None:
    average = BatchAverage(np.arange(2), 2, "cpu")
    values = torch.ones(2, 3)
    forward = average.watch(lambda batch: (values, []))
    assert forward(batch_of([0, 1], [1, 2], 3)) == (values, [])
    assert average.loss(lambda x: x) == 1.0
