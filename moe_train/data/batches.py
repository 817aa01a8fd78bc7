"""Batches of token ids for training and for evaluation.

Suffixes: B sequences, S tokens per sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from moe_train.data.domains import Domains
from moe_train.data.indexed import IndexedDataset
from moe_train.data.sampling import PackedSampler


@dataclass(frozen=True)
class Batch:
    """B sequences of S tokens on the CPU."""

    ids_BS: torch.Tensor
    """int64: what the model reads."""
    labels_BS: torch.Tensor
    """int64: the next token of each position; meaningless where target_BS is False."""
    target_BS: torch.Tensor
    """bool: True where the label counts in the loss."""
    padding_BS: torch.Tensor
    """bool: True = padding."""
    sample_B: torch.Tensor
    """int64: global sample index; -1 for a row that is padding only."""
    domain_BS: torch.Tensor | None = None
    """int64: code of the domain of ids_BS; -1 at padding. None where it was not asked for."""


def micro_batch(sampler: PackedSampler, start: int, count: int, domains: Domains | None = None) -> Batch:
    """Samples start <= index < start + count as one batch; every label is a target.

    domains: adds domain_BS.
    """
    samples = np.stack([sampler.sample(index) for index in range(start, start + count)])
    length = sampler.sequence_length
    domain_BS = None
    if domains is not None:
        codes = [domains.of_tokens(sampler.start(index), length) for index in range(start, start + count)]
        domain_BS = torch.from_numpy(np.stack(codes))
    return Batch(
        ids_BS=torch.from_numpy(samples[:, :-1].copy()),
        labels_BS=torch.from_numpy(samples[:, 1:].copy()),
        target_BS=torch.ones(count, length, dtype=torch.bool),
        padding_BS=torch.zeros(count, length, dtype=torch.bool),
        sample_B=torch.arange(start, start + count),
        domain_BS=domain_BS,
    )


def rank_slice(step_start: int, micro_index: int, rank: int, dp_size: int, micro_size: int) -> int:
    """First sample of a rank's micro-batch in the step that starts at sample `step_start`.

    The samples of a step do not depend on how many ranks share them.
    """
    return step_start + (micro_index * dp_size + rank) * micro_size


def evaluation_windows(dataset: IndexedDataset, sequence_length: int) -> int:
    """Number of windows that cover every target of the data set once; the last may be shorter than S.

    Errors: ValueError where there is no target at all (fewer than two tokens).
    """
    if dataset.token_count < 2:
        raise ValueError(f"{dataset.prefix} has {dataset.token_count} tokens; evaluation needs at least 2")
    return -(-(dataset.token_count - 1) // sequence_length)


def evaluation_batches(
    dataset: IndexedDataset,
    sequence_length: int,
    micro_size: int,
    *,
    rank: int = 0,
    dp_size: int = 1,
    max_batches: int | None = None,
    domains: Domains | None = None,
) -> Iterator[Batch]:
    """Every window once, in stream order, spread over the ranks; each token but the first is a target exactly once.

    All ranks get the same number of batches of the same shape [micro_size, S]: what is missing in the last ones is
    padding (ids 0, no targets), up to batches of nothing else. sample_B counts windows.

    max_batches: at most so many batches per rank. Their windows are spread evenly over the stream (documents lie in the
    order of their sources, so the first ones are no fair sample) and depend on the number of windows only, not on how
    ranks share them.   domains: adds domain_BS.
    """
    windows = evaluation_windows(dataset, sequence_length)
    per_batch = micro_size * dp_size
    wanted = windows if max_batches is None else min(windows, max_batches * per_batch)
    for index in range(-(-wanted // per_batch)):
        first = rank_slice(0, index, rank, dp_size, micro_size)
        chosen = [row * windows // wanted for row in range(first, min(first + micro_size, wanted))]
        yield _window_batch(dataset, sequence_length, chosen, micro_size, domains)


def _window_batch(
    dataset: IndexedDataset, length: int, chosen: list[int], count: int, domains: Domains | None
) -> Batch:
    shape = (count, length)
    ids, labels, target = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool)
    sample, domain = np.full(count, -1, np.int64), np.full(shape, -1, np.int64)
    for row, window in enumerate(chosen):
        tokens = dataset.tokens[window * length : (window + 1) * length + 1]
        used = len(tokens) - 1
        ids[row, :used], labels[row, :used], target[row, :used] = tokens[:-1], tokens[1:], True
        sample[row] = window
        if domains is not None:
            domain[row, :used] = domains.of_tokens(window * length, used)
    # Windows have no holes: what is no target is padding (the last token of the stream is only ever a label).
    return Batch(
        ids_BS=torch.from_numpy(ids),
        labels_BS=torch.from_numpy(labels),
        target_BS=torch.from_numpy(target),
        padding_BS=torch.from_numpy(~target),
        sample_B=torch.from_numpy(sample),
        domain_BS=None if domains is None else torch.from_numpy(domain),
    )
