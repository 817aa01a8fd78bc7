"""What one sample of a data set holds, by its place in the data set; three ways to cut a data set into samples.

Each reader numbers its samples (places) in the order of the data set, without shuffling, and writes them into rows.

Suffixes: K rows that are written, S tokens per sequence.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moe_train.data.dataset import Dataset
from moe_train.data.domains import Domains
from moe_train.data.rows import Rows

Places = npt.NDArray[np.int64]


class Reader(Protocol):
    """dataset: the tokens.   sequence_length: S.   count: places of an epoch.   evaluation_count: places that together
    hold every target of the data set.   domains: labels of its documents, None where nobody asked.   cuts: whether a
    sequence may hold several texts that do not see each other."""

    dataset: Dataset
    sequence_length: int
    count: int
    evaluation_count: int
    domains: Domains | None
    cuts: bool

    def fill(self, rows: Rows, at_K: Places, places_K: Places) -> None:
        """Writes the samples of these places into the rows at_K, which rise."""

    def spans(self, place: int) -> list[tuple[int, int]]:
        """The tokens of a sample as pieces start <= position < stop of the stream, the last target of each included."""

    def identity(self) -> dict[str, Any]:
        """What decides the samples besides data set and sequence length."""

    def too_small(self) -> str:
        """Why there is no place at all."""


class _Segments:
    """Writes pieces of the stream into rows, with loss mask and domains where there are any."""

    def __init__(self, dataset: Dataset, sequence_length: int, mask: Dataset | None, domains: Domains | None) -> None:
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, not {sequence_length}")
        self.dataset, self.sequence_length, self.mask, self.domains = dataset, sequence_length, mask, domains

    def _put(self, rows: Rows, row: int, offset: int, start: int, length: int) -> None:
        """`length` inputs from `start` on with their targets, at the offset of a row."""
        part = slice(offset, offset + length)
        tokens = self.dataset.read(start, start + length + 1)
        rows.ids_NS[row, part], rows.labels_NS[row, part] = tokens[:-1], tokens[1:]
        rows.padding_NS[row, part] = False
        rows.target_NS[row, part] = True if self.mask is None else self.mask.read(start + 1, start + length + 1) != 0
        if rows.position_NS is not None:
            rows.position_NS[row, part] = np.arange(length)
        if rows.domain_NS is not None and self.domains is not None:
            rows.domain_NS[row, part] = self.domains.of_tokens(start, length)


class WindowReader(_Segments):
    """Windows of S + 1 tokens with stride S over all documents joined.

    Every token but the first of the stream is a target exactly once per epoch (those behind the last whole window
    excepted). A window may span documents.   reset: such a window is cut at each document's first token, which is no
    target then; positions restart there.   mask: bytes that say which tokens are targets.
    """

    def __init__(
        self,
        dataset: Dataset,
        sequence_length: int,
        *,
        reset: bool = False,
        mask: Dataset | None = None,
        domains: Domains | None = None,
    ) -> None:
        super().__init__(dataset, sequence_length, mask, domains)
        self.cuts = reset
        self._offsets_S = np.arange(sequence_length)
        targets = max(dataset.token_count - 1, 0)
        self.count, self.evaluation_count = targets // sequence_length, -(-targets // sequence_length)

    def fill(self, rows: Rows, at_K: Places, places_K: Places) -> None:
        length = self.sequence_length
        starts_K = places_K * length
        whole_K = places_K < self.count
        if whole_K.all():
            self._fill_whole(rows, at_K, starts_K)
        else:
            self._fill_whole(rows, at_K[whole_K], starts_K[whole_K])
            for row, start in zip(at_K[~whole_K].tolist(), starts_K[~whole_K].tolist(), strict=True):
                self._put(rows, row, 0, start, self.dataset.token_count - 1 - start)
        if self.cuts:
            for row, start in zip(at_K.tolist(), starts_K.tolist(), strict=True):
                self._cut(rows, row, start, min(length, self.dataset.token_count - 1 - start))

    def spans(self, place: int) -> list[tuple[int, int]]:
        start = place * self.sequence_length
        return [(start, min(start + self.sequence_length + 1, self.dataset.token_count))]

    def identity(self) -> dict[str, Any]:
        return {"sampler": "packed", "reset": self.cuts, "mask": self.mask is not None}

    def too_small(self) -> str:
        return (
            f"it has {self.dataset.token_count} tokens, fewer than one sample needs "
            f"({self.sequence_length + 1} for sequence_length {self.sequence_length})"
        )

    def _fill_whole(self, rows: Rows, at_K: Places, starts_K: Places) -> None:
        """All rows at once; the same as `_put` for each."""
        if at_K.size == 0:
            return
        length = self.sequence_length
        tokens = self.dataset.read_rows(starts_K, length + 1)
        # All rows, in order: a slice is written without looking rows up.
        at = slice(None) if at_K.size == len(rows.ids_NS) else at_K
        rows.ids_NS[at], rows.labels_NS[at] = tokens[:, :-1], tokens[:, 1:]
        rows.padding_NS[at] = False
        rows.target_NS[at] = True if self.mask is None else self.mask.read_rows(starts_K + 1, length) != 0
        if rows.position_NS is not None:
            rows.position_NS[at] = self._offsets_S
        if rows.domain_NS is not None and self.domains is not None:
            for row, start in zip(at_K.tolist(), starts_K.tolist(), strict=True):
                rows.domain_NS[row] = self.domains.of_tokens(start, length)

    def _cut(self, rows: Rows, row: int, start: int, used: int) -> None:
        """Ends the texts of a row before the first token of each document that begins inside the window."""
        assert rows.position_NS is not None
        first, last = self.dataset.document_at(start), self.dataset.document_at(start + used)
        if first == last:
            return
        # Empty documents begin where the next one does.
        bounds = sorted(set((self.dataset.document_bounds(first + 1, last + 1)[:-1] - start).tolist()))
        for begin, end in pairwise([*bounds, used]):
            rows.target_NS[row, begin - 1] = False
            rows.position_NS[row, begin:end] = self._offsets_S[: end - begin]


class DocumentReader(_Segments):
    """One document per sequence, its first S + 1 tokens, padded on the right.

    documents: [places] numbers of the documents that hold a target (`index.write_index`).
    """

    def __init__(
        self,
        dataset: Dataset,
        sequence_length: int,
        documents: npt.NDArray[np.int64],
        *,
        mask: Dataset | None = None,
        domains: Domains | None = None,
    ) -> None:
        super().__init__(dataset, sequence_length, mask, domains)
        self.documents, self.cuts = documents, False
        self.count = self.evaluation_count = len(documents)

    def fill(self, rows: Rows, at_K: Places, places_K: Places) -> None:
        for row, place in zip(at_K.tolist(), places_K.tolist(), strict=True):
            [(start, stop)] = self.spans(place)
            self._put(rows, row, 0, start, stop - start - 1)

    def spans(self, place: int) -> list[tuple[int, int]]:
        start, stop = self.dataset.document_span(int(self.documents[place]))
        return [(start, min(stop, start + self.sequence_length + 1))]

    def identity(self) -> dict[str, Any]:
        return {"sampler": "documents", "mask": self.mask is not None}

    def too_small(self) -> str:
        return _no_targets(self.dataset)


class PackedDocumentReader(_Segments):
    """Whole documents, one behind the other, as many as fit into S inputs; a longer one is truncated to S + 1 tokens.

    A document of n tokens has n - 1 inputs: its last token is a target only. The texts of a sequence do not see each
    other. What is left of a sequence is padding.

    firsts: [places] number of the first document of each sequence (`index.write_index`).
    """

    def __init__(
        self,
        dataset: Dataset,
        sequence_length: int,
        firsts: npt.NDArray[np.int64],
        *,
        mask: Dataset | None = None,
        domains: Domains | None = None,
    ) -> None:
        super().__init__(dataset, sequence_length, mask, domains)
        self.firsts, self.cuts = firsts, True
        self.count = self.evaluation_count = len(firsts)

    def fill(self, rows: Rows, at_K: Places, places_K: Places) -> None:
        for row, place in zip(at_K.tolist(), places_K.tolist(), strict=True):
            offset = 0
            for start, stop in self.spans(place):
                self._put(rows, row, offset, start, stop - start - 1)
                offset += stop - start - 1

    def spans(self, place: int) -> list[tuple[int, int]]:
        first = int(self.firsts[place])
        stop = int(self.firsts[place + 1]) if place + 1 < self.count else len(self.dataset)
        bounds = self.dataset.document_bounds(first, stop)
        starts, ends = bounds[:-1], np.minimum(bounds[1:], bounds[:-1] + self.sequence_length + 1)
        pairs = zip(starts.tolist(), ends.tolist(), strict=True)
        return [(begin, end) for begin, end in pairs if end - begin >= 2]

    def identity(self) -> dict[str, Any]:
        return {"sampler": "packed documents", "mask": self.mask is not None}

    def too_small(self) -> str:
        return _no_targets(self.dataset)


def _no_targets(dataset: Dataset) -> str:
    return f"none of its {len(dataset)} documents has the two tokens that a target needs"
