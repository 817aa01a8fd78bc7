"""What a checkpoint's files hold: index.json, from which alone its tensors are found.

torch's own index (.metadata) is a pickle, which could run anything when it is read. It is written too, so that torch's
tools can open our checkpoints, and never read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moe_train.parallel.passing import may_pass

INDEX = "index.json"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class StoredTensor:
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredBox:
    """A box of a tensor in a file: an archive of torch.save at bytes [start, start + length)."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredFile:
    bytes: int
    xxh3: str
    """Of its content, 128 bits in hexadecimal."""


@dataclass
class Index:
    """Of a whole checkpoint, or of what one rank wrote of it."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    boxes: list[StoredBox] = field(default_factory=list)
    files: dict[str, StoredFile] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global name -> shape of every tensor."""
        return {key: tensor.shape for key, tensor in self.tensors.items()}

    def to_json(self) -> dict[str, Any]:
        boxes: dict[str, list[list[Any]]] = {key: [] for key in self.tensors}
        for box in self.boxes:
            boxes[box.key].append([list(box.offsets), list(box.sizes), box.file, box.start, box.length])
        return {
            "tensors": {
                key: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape), "boxes": boxes[key]}
                for key, t in self.tensors.items()
            },
            "files": {name: {"bytes": f.bytes, "xxh3": f.xxh3} for name, f in self.files.items()},
        }


def merge(parts: Iterable[Index]) -> Index:
    """The index of a whole checkpoint from those of its ranks.

    Errors: ValueError where ranks disagree on a tensor, or a tensor is not covered exactly once.
    """
    whole = Index()
    for part in parts:
        for key, tensor in part.tensors.items():
            if whole.tensors.setdefault(key, tensor) != tensor:
                raise ValueError(f"{key} is {whole.tensors[key]} on one rank and {tensor} on another")
        whole.boxes += part.boxes
        whole.files |= part.files
    check_covered(whole)
    return whole


def check_covered(index: Index) -> None:
    """ValueError unless every element of every tensor is stored in exactly one box."""
    boxes: dict[str, list[StoredBox]] = {key: [] for key in index.tensors}
    for box in index.boxes:
        boxes[box.key].append(box)
    for key, tensor in index.tensors.items():
        stored = sum(math.prod(box.sizes) for box in boxes[key])
        if stored != math.prod(tensor.shape):
            raise ValueError(f"{stored} elements of {key} are stored, and it has {math.prod(tensor.shape)}")
        if _overlap(boxes[key]):
            raise ValueError(f"a part of {key} is stored twice")


def _overlap(boxes: list[StoredBox]) -> bool:
    """Whether two boxes share an element. Boxes of flat slices: those that share a first index are few."""
    ordered = sorted(boxes, key=lambda box: box.offsets)
    active: list[StoredBox] = []
    for box in ordered:
        if not box.offsets:
            return len(ordered) > 1
        active = [other for other in active if other.offsets[0] + other.sizes[0] > box.offsets[0]]
        for other in active:
            spans = zip(box.offsets, box.sizes, other.offsets, other.sizes, strict=True)
            if all(a < b + m and b < a + n for a, n, b, m in spans):
                return True
        active.append(box)
    return False


def index_bytes(index: Index) -> bytes:
    """The content of index.json."""
    return (json.dumps(index.to_json(), separators=(",", ":")) + "\n").encode()


def read_index(directory: Path) -> Index:
    """Errors: ValueError where there is none, or it says what cannot be (it may come from anywhere); OSError where that
    cannot be said now, as the disk is away."""
    path = directory / INDEX
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if may_pass(error):
            raise
        raise ValueError(f"checkpoint {directory} cannot be read ({INDEX}: {error})") from error
    try:
        return _parsed(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {directory}: {INDEX} is damaged ({error})") from error


def _parsed(content: Any) -> Index:
    index = Index()
    for name, file in _object(content["files"]).items():
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a file in it")
        index.files[name] = StoredFile(_count(file["bytes"]), str(file["xxh3"]))
    for key, entry in _object(content["tensors"]).items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{key} has the unknown type {entry['dtype']!r}")
        tensor = StoredTensor(DTYPES[entry["dtype"]], _counts(entry["shape"]))
        index.tensors[key] = tensor
        for offsets, sizes, file, start, length in entry["boxes"]:
            box = StoredBox(key, _counts(offsets), _counts(sizes), file, _count(start), _count(length))
            _check_box(box, tensor, index.files)
            index.boxes.append(box)
    check_covered(index)
    return index


def _check_box(box: StoredBox, tensor: StoredTensor, files: Mapping[str, StoredFile]) -> None:
    spans = zip(box.offsets, box.sizes, tensor.shape, strict=True)
    if not all(first + size <= whole for first, size, whole in spans):
        raise ValueError(f"a box of {box.key} lies outside of it")
    if box.start + box.length > files[box.file].bytes:
        raise ValueError(f"a box of {box.key} lies behind the end of {box.file}")


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no object")
    return value


def _counts(values: Any) -> tuple[int, ...]:
    return tuple(_count(value) for value in values)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
