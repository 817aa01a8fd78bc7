"""Writing boxes of tensors into the files of a checkpoint, one box in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from moe_train.checkpoint.index import Index, StoredBox, StoredFile, StoredTensor
from moe_train.checkpoint.slices import Box
from moe_train.data.files import sync

_FILE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class LazyBox:
    """An N-dimensional part of the global tensor ``key`` whose values are fetched when they are written."""

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Returns a contiguous tensor on the CPU with these values in any shape."""


def lazy(box: Box) -> LazyBox:
    """A box that is in memory already."""
    data = box.data
    return LazyBox(box.key, box.shape, box.offsets, tuple(data.shape), data.dtype, lambda: data.detach().cpu())


def write_boxes(directory: Path, prefix: str, boxes: Iterable[LazyBox]) -> Index:
    """Writes <prefix>0.distcp, <prefix>1.distcp, … and returns what they hold; they are on the disk then.

    Each box is an archive of torch.save, as torch.distributed.checkpoint writes them. Boxes are read in the order
    given. Errors: OSError where a file cannot be written; whatever ``LazyBox.read`` raises.
    """
    index = Index()
    waiting = iter(boxes)
    box = next(waiting, None)
    with _without_checksums():
        while box is not None:
            name = f"{prefix}{len(index.files)}.distcp"
            with open(directory / name, "wb") as file:
                stream = _Stream(file)
                while box is not None and stream.position < _FILE_BYTES:
                    index.boxes.append(_write(stream, name, box))
                    index.tensors[box.key] = StoredTensor(box.dtype, box.shape)
                    box = next(waiting, None)
                file.flush()
                os.fsync(file.fileno())
            index.files[name] = StoredFile(stream.position, stream.digest.hexdigest())
    sync(directory)
    return index


@contextmanager
def _without_checksums() -> Iterator[None]:
    """torch.save computes CRC-32 of all values, which takes as long as writing them; files have checksums of their
    own."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Stream:
    """What torch.save writes to; remembers why writing failed, which torch hides behind an error of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.position = file, 0
        self.digest = xxhash.xxh3_128()
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            count = self.file.write(content)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(content)
        self.position += count
        return count

    def flush(self) -> None:
        pass


def _write(stream: _Stream, name: str, box: LazyBox) -> StoredBox:
    start = stream.position
    tensor = box.read().view(box.sizes)
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()
    try:
        torch.save(tensor, stream)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise stream.error or error from None
    return StoredBox(box.key, box.offsets, box.sizes, name, start, stream.position - start)
