"""Evaluation batches of one document per row: cut at a length, padded, each document once over all ranks.

Suffixes: B sequences, S tokens per sequence, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from moe_train.data.batches import Batch, rank_slice
from moe_train.data.dataset import Dataset
from moe_train.data.domains import Domains

_CHUNK = 1 << 20


class DocumentSet:
    """The first tokens of documents, apart from each other.

    max_length: so many tokens of a document are used at most. As there is nothing in front of the first one, it is no
    target: a document gives one target less than it has tokens.
    eod_id: where a document ends with this token it is left out, so that only text is predicted.
    limit: at most so many documents, spread evenly over the data set.
    loss_mask: of instruction data (dataset.open_loss_mask); only what it marks is a target.

    index_D: the documents, as numbers in the data set.   truncated: how many of them were cut.
    Errors: ValueError where max_length leaves nothing to predict, or no document has a target.
    """

    def __init__(
        self,
        dataset: Dataset,
        max_length: int,
        *,
        eod_id: int | None = None,
        limit: int | None = None,
        loss_mask: Dataset | None = None,
    ) -> None:
        if max_length < 2:
            raise ValueError(f"of documents cut at {max_length} tokens nothing is left to predict: 2 at least")
        self.dataset, self.loss_mask = dataset, loss_mask
        wanted = len(dataset) if limit is None else min(len(dataset), limit)
        self.index_D = np.arange(wanted, dtype=np.int64) * len(dataset) // max(wanted, 1)
        self._tokens_D = np.empty(wanted, np.int32)
        self.truncated = 0
        # The documents' places are looked up again when they are read: 12 bytes per document are kept.
        for begin in range(0, wanted, _CHUNK):
            part = slice(begin, begin + _CHUNK)
            lengths = self._text_lengths(self.index_D[part], eod_id)
            self.truncated += int((lengths > max_length).sum())
            self._tokens_D[part] = np.minimum(lengths, max_length)
        if not (self._tokens_D > 1).any():
            raise ValueError(f"no document of {dataset.prefix} has the 2 tokens that a prediction needs")

    def _text_lengths(self, numbers_D: npt.NDArray[np.int64], eod_id: int | None) -> npt.NDArray[np.int64]:
        ends_D = self.dataset.document_starts(numbers_D + 1)
        lengths_D = ends_D - self.dataset.document_starts(numbers_D)
        filled = np.flatnonzero(lengths_D)
        if eod_id is not None and filled.size:
            lengths_D[filled] -= self.dataset.read_rows(ends_D[filled] - 1, 1)[:, 0] == eod_id
        return lengths_D

    def __len__(self) -> int:
        return len(self.index_D)

    def batches(
        self, micro_size: int, *, rank: int = 0, dp_size: int = 1, domains: Domains | None = None
    ) -> Iterator[Batch]:
        """Every document once, in order, spread over the ranks; sample_B is the document's number in the data set.

        All ranks get the same number of batches, and at the same time batches of the same shape [micro_size, S], where
        S fits the longest document of all ranks then. What is missing is padding, up to batches of nothing else.
        domains: adds domain_BS.
        """
        per_batch = micro_size * dp_size
        for index in range(-(-len(self) // per_batch)):
            everywhere = slice(index * per_batch, (index + 1) * per_batch)
            length = max(1, int(self._tokens_D[everywhere].max()) - 1)
            first = rank_slice(0, index, rank, dp_size, micro_size)
            rows = range(first, min(first + micro_size, len(self)))
            yield self._batch(rows, micro_size, length, domains)

    def _batch(self, rows: range, count: int, length: int, domains: Domains | None) -> Batch:
        shape = (count, length)
        ids, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        target, padding = np.zeros(shape, bool), np.ones(shape, bool)
        sample, domain = np.full(count, -1, np.int64), np.full(shape, -1, np.int64)
        starts_B = self.dataset.document_starts(self.index_D[rows.start : rows.stop])
        for place, (row, start) in enumerate(zip(rows, starts_B.tolist(), strict=True)):
            stop = start + int(self._tokens_D[row])
            tokens = self.dataset.read(start, stop)
            used = max(0, len(tokens) - 1)
            ids[place, :used], labels[place, :used], padding[place, :used] = tokens[:used], tokens[1:], False
            target[place, :used] = True if self.loss_mask is None else self.loss_mask.read(start, stop)[1:] != 0
            sample[place] = self.index_D[row]
            if domains is not None:
                domain[place, :used] = domains.codes[self.index_D[row]]
        # A document's last token is only ever a label.
        return Batch(
            ids_BS=torch.from_numpy(ids),
            labels_BS=torch.from_numpy(labels),
            target_BS=torch.from_numpy(target),
            padding_BS=torch.from_numpy(padding),
            sample_B=torch.from_numpy(sample),
            domain_BS=None if domains is None else torch.from_numpy(domain),
        )
