"""Which documents a sample was made of: the way back from training to the text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moe_train.data.dataset import Dataset
from moe_train.data.training_set import TrainingSet


@dataclass(frozen=True)
class Piece:
    """Part of a document: its tokens first <= index < stop."""

    document: int
    first: int
    stop: int


@dataclass(frozen=True)
class ReadSample:
    index: int
    """Of the run, from 0."""
    name: str
    """The data set that it comes from."""
    epoch: int
    """Of that data set, from 0."""
    pieces: list[Piece]
    """What was read, the last target of each text included."""


def trace(samples: TrainingSet, index: int) -> ReadSample:
    """What a sample of a run was made of."""
    member_N, place_N = samples.locate(np.array([index]))
    number = int(member_N[0])
    sampler = samples.samplers[number]
    # As many samples of this data set came before.
    epoch = int(samples.samples_of(index)[number]) // sampler.samples_per_epoch
    dataset = sampler.reader.dataset
    found = [piece for span in sampler.reader.spans(int(place_N[0])) for piece in pieces(dataset, *span)]
    return ReadSample(index, samples.names[number], epoch, found)


def pieces(dataset: Dataset, start: int, stop: int) -> Iterator[Piece]:
    """The documents that hold the tokens start <= position < stop of the stream, with the part that does."""
    while start < stop:
        document = dataset.document_at(start)
        begin, end = dataset.document_span(document)
        yield Piece(document, start - begin, min(end, stop) - begin)
        start = end
