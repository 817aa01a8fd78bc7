"""The index of samples that are documents: a file with one int64 per sample, written once and memory-mapped.

Suffixes: D documents of a chunk.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from moe_train.data.dataset import Dataset, data_prefixes
from moe_train.data.indexed import bin_path, idx_path

_CHUNK = 1 << 20
OncePerNode = Callable[[Callable[[], None]], None]


def open_index(
    dataset: Dataset, name: str, sequence_length: int, folder: Path, *, pack: bool, once: OncePerNode
) -> npt.NDArray[np.int64]:
    """[samples] memory-mapped: the documents with a target, or with `pack` the first document of each sequence.

    The file is written where the folder does not have it yet, through `once` (`parallel.once.once_per_node`): every
    node needs a folder of its own or one that all share. Its name says which data it belongs to, so that other data
    under the same name, or other options, get another file.
    """
    path = folder / f"{Path(name).name}-{_key(name, sequence_length, pack)}.index"

    def build() -> None:
        if path.is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
        try:
            with open(temporary, "wb") as stream:
                write_index(stream, dataset, sequence_length, pack=pack)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    once(build)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist, although local rank 0 of this node should have written it: "
            "the processes of a node need one folder for data.index_cache"
        )
    # An empty file cannot be mapped.
    if path.stat().st_size == 0:
        return np.zeros(0, np.int64)
    return np.asarray(np.memmap(path, dtype="<i8", mode="r"))


def write_index(stream: BinaryIO, dataset: Dataset, sequence_length: int, *, pack: bool) -> None:
    """Writes the index to a file, some documents at a time. A document of one token or none is in no sample."""
    # As if a full sequence stood before: the first document begins a new one.
    used = sequence_length
    for numbers_D, tokens_D in _documents(dataset):
        kept = tokens_D >= 2
        numbers_D, inputs_D = numbers_D[kept], np.minimum(tokens_D[kept] - 1, sequence_length)
        if pack:
            numbers_D, used = _next_fit(numbers_D, inputs_D, sequence_length, used)
        stream.write(numbers_D.astype("<i8").tobytes())


def _next_fit(
    numbers_D: npt.NDArray[np.int64], inputs_D: npt.NDArray[np.int64], size: int, used: int
) -> tuple[npt.NDArray[np.int64], int]:
    """Documents that begin a sequence, when each goes into the open sequence if it fits and else begins another.

    used: inputs in the open sequence before; returned as it is afterwards.
    """
    ends_D = np.cumsum(inputs_D)
    opened: list[int] = []
    place, before = 0, 0
    while place < len(ends_D):
        stop = int(np.searchsorted(ends_D, before + size - used, side="right"))
        if stop == place:
            opened.append(place)
            used = 0
            continue
        used += int(ends_D[stop - 1]) - before
        place, before = stop, int(ends_D[stop - 1])
    return numbers_D[opened], used


def _documents(dataset: Dataset) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    for first in range(0, len(dataset), _CHUNK):
        stop = min(first + _CHUNK, len(dataset))
        yield np.arange(first, stop), np.diff(dataset.document_bounds(first, stop))


def _key(name: str, sequence_length: int, pack: bool) -> str:
    """Changes with the files of the data set: what they are called, their sizes and when the index was written."""
    facts: list[object] = [sequence_length if pack else None, pack]
    for prefix in data_prefixes(name):
        index = idx_path(prefix).stat()
        facts.append([Path(prefix).name, index.st_size, index.st_mtime_ns, bin_path(prefix).stat().st_size])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
