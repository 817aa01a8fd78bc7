"""Which samples a rank reads, in training and in evaluation.

Suffixes: B sequences, S tokens per sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from moe_train.data.blend import Pattern
from moe_train.data.readers import Reader
from moe_train.data.rows import Batch, Rows

__all__ = ["Batch", "evaluation_batches", "evaluation_samples", "rank_slice"]


def rank_slice(step_start: int, micro_index: int, rank: int, dp_size: int, micro_size: int) -> int:
    """First sample of a rank's micro-batch in the step that starts at sample `step_start`.

    The samples of a step do not depend on how many ranks share them.
    """
    return step_start + (micro_index * dp_size + rank) * micro_size


def evaluation_samples(readers: Sequence[Reader], weights: Sequence[float] | None, limit: int | None) -> list[int]:
    """How many samples evaluation reads of each data set.

    Without weights all of them, or with a `limit` as many of each as its size is worth; with weights as many as can be
    had in these shares. Errors: ValueError where there is no target at all.
    """
    sizes = [reader.evaluation_count for reader in readers]
    for reader, size in zip(readers, sizes, strict=True):
        if size < 1:
            raise ValueError(f"evaluation needs at least 2 tokens: {reader.dataset.prefix} is too small")
    if weights is None:
        total = sum(sizes)
        wanted = total if limit is None else min(total, limit)
        ends = [end * wanted // total for end in np.cumsum(sizes).tolist()]
        return np.diff(ends, prepend=0).tolist()
    pattern = Pattern(weights)
    # The most periods that every data set can fill, then sample by sample.
    wanted = min(size // count for size, count in zip(sizes, pattern.counts_M.tolist(), strict=True)) * pattern.period
    while (pattern.counts_before(wanted + 1) <= np.array(sizes)).all():
        wanted += 1
    return pattern.counts_before(wanted if limit is None else min(wanted, limit)).tolist()


def evaluation_batches(
    readers: Sequence[Reader],
    micro_size: int,
    *,
    rank: int = 0,
    dp_size: int = 1,
    max_batches: int | None = None,
    weights: Sequence[float] | None = None,
) -> Iterator[Batch]:
    """Every sample of the data sets once, in their order, spread over the ranks.

    All ranks get the same number of batches of the same shape [micro_size, S]: what is missing in the last ones is
    padding (ids 0, no targets), up to batches of nothing else. sample_B counts samples through all data sets.

    max_batches: at most so many batches per rank. Their samples are spread evenly over each data set (documents lie in
    the order of their sources, so the first ones are no fair sample) and depend on their number only, not on how ranks
    share them.   weights: shares of the data sets, which then bound how much of each is read.
    """
    per_batch = micro_size * dp_size
    counts = evaluation_samples(readers, weights, None if max_batches is None else max_batches * per_batch)
    sizes = [reader.evaluation_count for reader in readers]
    ends, before = np.cumsum(counts), np.cumsum(sizes) - sizes
    length = readers[0].sequence_length
    positions, domains = any(r.cuts for r in readers), any(r.domains is not None for r in readers)
    wanted = int(ends[-1])
    for index in range(-(-wanted // per_batch)):
        first = rank_slice(0, index, rank, dp_size, micro_size)
        rows = Rows(micro_size, length, positions=positions, domains=domains)
        chosen = np.arange(first, max(first, min(first + micro_size, wanted)))
        member_N = np.searchsorted(ends, chosen, side="right")
        for member in np.unique(member_N).tolist():
            at = np.flatnonzero(member_N == member)
            place = (chosen[at] - (ends[member] - counts[member])) * sizes[member] // counts[member]
            readers[member].fill(rows, at, place)
            rows.sample_N[at] = before[member] + place
        yield rows.batch()
