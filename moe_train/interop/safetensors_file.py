"""The safetensors format: 8 bytes with the length of a JSON header, the header, then the values in a row.

Read and written by ranges, so that never more than one tensor lies in memory, and read rather than mapped, because
mapped pages count as memory of the process. The format is described at https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_train.checkpoint.ranges import memory_of, read_range
from moe_train.data.files import sync

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Those that a torch tensor has."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100 * 2**20
_LFS_POINTER = b"version https://git-lfs"
_Entry = tuple[str, torch.dtype, tuple[int, ...], tuple[int, int]]
"""Name, type, shape, and where the values begin and end behind the header."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte of its values in the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int = 0, stop: int | None = None) -> Tensor:
        """Rows [first, stop) along the first dimension; of a scalar the scalar itself.

        Errors: OSError; ValueError where the file ends too early.
        """
        if not self.shape:
            return self._read((), self.start)
        stop = self.shape[0] if stop is None else stop
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return self._read((stop - first, *self.shape[1:]), self.start + first * row)

    def _read(self, shape: tuple[int, ...], position: int) -> Tensor:
        tensor = torch.empty(shape, dtype=self.dtype)
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            read_range(descriptor, position, memory_of(tensor))
        except EOFError:
            raise ValueError(f"{self.path} ends too early: it was cut off while it was read") from None
        finally:
            os.close(descriptor)
        return tensor


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name, in the order of their values.

    Errors: OSError; ValueError where it is no whole safetensors file, or has a type that torch lacks.
    """
    size = path.stat().st_size
    with open(path, "rb") as stream:
        begin = stream.read(8)
        if begin == _LFS_POINTER[:8] and begin + stream.read(len(_LFS_POINTER) - 8) == _LFS_POINTER:
            raise ValueError(f"{path} is a pointer of git-lfs, not the file itself: fetch it with `git lfs pull`")
        length = int.from_bytes(begin, "little")
        if len(begin) < 8 or not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            raise ValueError(f"{path} is no safetensors file, or damaged (its header would have {length} bytes)")
        text = stream.read(length)
    entries = sorted(_entries(path, text), key=lambda entry: entry[3])
    found: dict[str, StoredTensor] = {}
    begin_values, end, before = 8 + length, 0, "its header"
    for name, dtype, shape, (first, last) in entries:
        stored = StoredTensor(path, dtype, shape, begin_values + first)
        if stored.nbytes != last - first:
            raise ValueError(f"{path} is damaged: {name} is {stored.nbytes} bytes of values, not {last - first}")
        if first != end:  # the format knows neither gaps nor values of two tensors
            raise ValueError(f"{path} is damaged: the values of {name} begin at byte {first}, not at {end}")
        if begin_values + last > size:
            raise ValueError(f"{path} ends before the values of {name}: it was not copied or downloaded to its end")
        found[name] = stored
        end, before = last, f"the values of {name}"
    if begin_values + end != size:
        raise ValueError(f"{path} is damaged: it has {size - begin_values - end} bytes behind {before}")
    return found


def _entries(path: Path, text: bytes) -> Iterator[_Entry]:
    """Errors: ValueError where the header of a file is none."""
    damaged = f"{path} is no safetensors file, or damaged"
    try:
        header = json.loads(text, object_pairs_hook=_Object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{damaged} (its header cannot be read)") from error
    if not isinstance(header, _Object):
        raise ValueError(f"{damaged} (its header is no object)")
    names = set()
    for name, content in header.pairs:
        if name in names:
            raise ValueError(f"{damaged}: {name} is there twice")
        names.add(name)
        if name == "__metadata__":
            continue
        entry = dict(content.pairs) if isinstance(content, _Object) else {}
        missing = [key for key in ("dtype", "shape", "data_offsets") if key not in entry]
        if missing:
            raise ValueError(f"{damaged}: {name} has no {missing[0]}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{path}: {name} has type {dtype}, which torch lacks")
        if not _counts(shape):
            raise ValueError(f"{damaged}: {name} has shape {shape!r}")
        if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise ValueError(f"{damaged}: {name} has data_offsets {offsets!r}")
        yield name, DTYPES[dtype], tuple(shape), (offsets[0], offsets[1])


@dataclass(frozen=True)
class _Object:
    """Of JSON, with the names that it has twice."""

    pairs: list[tuple[str, Any]]


def _counts(value: Any) -> bool:
    """Whether it is a list of whole numbers from 0 on."""
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def write_file(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], get: Callable[[str], Tensor]
) -> None:
    """Writes a file whose values ``get`` hands over one after the other; it is on the disk when this returns.

    Wider types stand first, so that all values are aligned. Errors: OSError.
    """
    order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        dtype, shape = tensors[name]
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = get(name)
            assert (tensor.dtype, tuple(tensor.shape)) == tensors[name], name
            stream.write(memory_of(tensor.contiguous()))
    sync(path)
