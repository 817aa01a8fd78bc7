"""Reading any box of any tensor of a checkpoint in one process, straight from the files.

torch's own reader loads the whole stored piece for every part of it that is asked for, and unpickles its index. Here
values are found by index.json and copied as bytes: nothing is unpickled.
"""

from __future__ import annotations

import itertools
import math
import os
import zipfile
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from moe_train.checkpoint.index import read_index
from moe_train.checkpoint.ranges import memory_of, read_range
from moe_train.parallel.passing import may_pass


@dataclass
class _Piece:
    """A stored box of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int
    data: int | None = None
    """Where its values begin in the file; None as long as nobody has asked."""


class StoredTensors:
    """The tensors of a checkpoint, whatever layout wrote it. Closes its files at the end of a ``with``."""

    def __init__(self, directory: Path) -> None:
        """Errors: ValueError where it cannot be read."""
        self.directory = directory
        self._files: dict[str, int] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        self.index = read_index(directory)
        self.shapes = self.index.shapes
        self.dtypes = {key: tensor.dtype for key, tensor in self.index.tensors.items()}
        for key in self.shapes:
            self._pieces[key] = []
        for box in self.index.boxes:
            self._pieces[box.key].append(_Piece(box.offsets, box.sizes, box.file, box.start, box.length))
        self._by_box = {(key, p.offsets, p.sizes): p for key, pieces in self._pieces.items() for p in pieces}

    def read(self, key: str, offsets: tuple[int, ...], out: Tensor) -> None:
        """Fills ``out``, of the tensor's number of dimensions, with the box that begins at ``offsets``; converts.

        Errors: ValueError where a part of the box is not stored, or a file is damaged.
        """
        exact = self._by_box.get((key, offsets, tuple(out.shape)))
        filled = 0
        for piece in self._pieces[key] if exact is None else [exact]:
            low = [max(a, b) for a, b in zip(offsets, piece.offsets, strict=True)]
            ends = zip(offsets, out.shape, piece.offsets, piece.sizes, strict=True)
            high = [min(a + n, b + m) for a, n, b, m in ends]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            target = out
            for dimension, (a, b, start) in enumerate(zip(low, high, offsets, strict=True)):
                target = target.narrow(dimension, a - start, b - a)
            self._read_from(piece, [a - b for a, b in zip(low, piece.offsets, strict=True)], target, self.dtypes[key])
            filled += target.numel()
        if filled != out.numel():
            raise ValueError(f"checkpoint {self.directory} lacks a part of {key}")

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _read_from(self, piece: _Piece, start: list[int], target: Tensor, dtype: torch.dtype) -> None:
        """The part of a stored box that begins at ``start`` and is as large as ``target``."""
        direct = target.dtype == dtype and target.is_contiguous() and target.device.type == "cpu"
        values = target if direct else torch.empty(target.shape, dtype=dtype)
        sizes, shape = piece.sizes, tuple(target.shape)
        # Everything behind dimension `run` is wanted whole, so that values lie in a row for each index before it.
        run = len(sizes) - 1
        while run > 0 and shape[run] == sizes[run]:
            run -= 1
        run = max(run, 0)
        length = math.prod(shape[run:]) * dtype.itemsize
        strides = [math.prod(sizes[d + 1 :]) for d in range(len(sizes))]
        memory = memory_of(values)
        begin = self._data(piece, dtype)
        for number, index in enumerate(itertools.product(*(range(n) for n in shape[:run]))):
            first = (*index, *[0] * (len(sizes) - len(index)))
            where = sum((s + i) * stride for s, i, stride in zip(start, first, strides, strict=True))
            self._fill(piece.file, begin + where * dtype.itemsize, memory[number * length : (number + 1) * length])
        if not direct:
            target.copy_(values)

    def _data(self, piece: _Piece, dtype: torch.dtype) -> int:
        """Where the values of a stored box begin: the one record `data/0` of a zip archive as torch.save writes it."""
        if piece.data is None:
            where = f"checkpoint {self.directory}: {piece.file} is damaged at byte {piece.start}"
            try:
                window = _Window(self._descriptor(piece.file), piece.start, piece.length)
                record = next(i for i in zipfile.ZipFile(window).infolist() if i.filename.endswith("/data/0"))
            except (zipfile.BadZipFile, StopIteration, OSError) as error:
                origin = error.__context__ or error  # what cannot be read is no archive either, says zipfile
                if may_pass(origin):
                    raise origin from None
                raise ValueError(f"{where} ({error or 'no values'})") from error
            if (
                record.compress_type != zipfile.ZIP_STORED
                or record.file_size != math.prod(piece.sizes) * dtype.itemsize
            ):
                raise ValueError(f"{where} (the record of values has another size)")
            window.seek(record.header_offset + 26)
            name, extra = (int.from_bytes(window.read(2), "little") for _ in range(2))
            piece.data = piece.start + record.header_offset + 30 + name + extra
        return piece.data

    def _fill(self, file: str, position: int, memory: memoryview) -> None:
        try:
            read_range(self._descriptor(file), position, memory)
        except EOFError:
            raise ValueError(f"checkpoint {self.directory}: {file} ends too early") from None

    def _descriptor(self, file: str) -> int:
        if file not in self._files:
            self._files[file] = os.open(self.directory / file, os.O_RDONLY)
        return self._files[file]


class _Window(RawIOBase):
    """A range of a file as a file."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._position = descriptor, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._length)[whence]
        if self._position < 0:
            raise OSError("before the beginning")
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._position)
        content = os.pread(self._descriptor, left if size < 0 else min(size, left), self._start + self._position)
        self._position += len(content)
        return content
