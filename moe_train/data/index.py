"""The index of samples that are documents: a file with one int64 per sample, written once and memory-mapped.

Suffixes: D documents of a chunk.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from moe_train.data.dataset import Dataset, data_prefixes
from moe_train.data.files import sync
from moe_train.data.indexed import bin_path, idx_path

_CHUNK = 1 << 20
_HEADER = struct.Struct("<8sQ")
_MAGIC = b"MOEINDX1"
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
        if _read_index(path) is not None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
        try:
            with open(temporary, "wb") as stream:
                stream.write(bytes(_HEADER.size))
                count = write_index(stream, dataset, sequence_length, pack=pack)
                stream.seek(0)
                stream.write(_HEADER.pack(_MAGIC, count))
            sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    once(build)
    found = _read_index(path)
    if found is None:
        raise FileNotFoundError(
            f"{path} does not exist, although local rank 0 of this node should have written it: "
            "the processes of a node need one folder for data.index_cache"
        )
    return found


def _read_index(path: Path) -> npt.NDArray[np.int64] | None:
    """None where there is no such file, or it is not whole."""
    try:
        with open(path, "rb") as stream:
            header = stream.read(_HEADER.size)
    except FileNotFoundError:
        return None
    if len(header) < _HEADER.size:
        return None
    magic, count = _HEADER.unpack(header)
    if magic != _MAGIC or path.stat().st_size != _HEADER.size + 8 * count:
        return None
    # An empty file cannot be mapped.
    return np.asarray(np.memmap(path, "<i8", "r", _HEADER.size, (count,))) if count else np.zeros(0, np.int64)


def write_index(stream: BinaryIO, dataset: Dataset, sequence_length: int, *, pack: bool) -> int:
    """Writes the index to a file, some documents at a time. A document of one token or none is in no sample.

    Returns the number of samples.
    """
    count = 0
    # As if a full sequence stood before: the first document begins a new one.
    used = sequence_length
    for numbers_D, tokens_D in _documents(dataset):
        kept = tokens_D >= 2
        numbers_D, inputs_D = numbers_D[kept], np.minimum(tokens_D[kept] - 1, sequence_length)
        if pack:
            numbers_D, used = _next_fit(numbers_D, inputs_D, sequence_length, used)
        stream.write(numbers_D.astype("<i8").tobytes())
        count += len(numbers_D)
    return count


def _next_fit(
    numbers_D: npt.NDArray[np.int64], inputs_D: npt.NDArray[np.int64], size: int, used: int
) -> tuple[npt.NDArray[np.int64], int]:
    """Documents that begin a sequence, when each goes into the open sequence if it fits and else begins another.

    used: inputs in the open sequence before; returned as it is afterwards.
    """
    ends_D = np.cumsum(inputs_D)
    # For each document: which one would begin the next sequence, if this one began a sequence.
    next_D = np.searchsorted(ends_D, ends_D - inputs_D + size, side="right")
    opened = _followed(next_D, int(np.searchsorted(ends_D, size - used, side="right")))
    total = int(inputs_D.sum())
    if opened.size:
        last = opened[-1]
        return numbers_D[opened], total - int(ends_D[last] - inputs_D[last])
    return numbers_D[opened], used + total


def _followed(next_D: npt.NDArray[np.int64], first: int) -> npt.NDArray[np.int64]:
    """`first`, the entry there, the entry there, and so on as far as there are any; entries point behind themselves.

    Going on one by one is a loop in Python: it takes 16 places at a time, and those between are filled in at once.
    """
    steps = [np.append(next_D, len(next_D))]  # by 1, 2, 4, 8 and 16 places
    for _ in range(4):
        steps.append(steps[-1][steps[-1]])
    places, place, far = [first], first, steps.pop()
    while (place := int(far[place])) < len(next_D):
        places.append(place)
    found = np.array(places)
    for step in reversed(steps):
        found = np.stack([found, step[found]], axis=1).reshape(-1)
    return found[found < len(next_D)]


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
