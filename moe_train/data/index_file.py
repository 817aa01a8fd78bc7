"""Writing an index of Megatron's format (indexed.py describes it) with flat memory."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HEADER = struct.Struct("<9sQBQQ")
MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
CODE_OF_DTYPE: dict[np.dtype[Any], int] = {np.dtype(np.uint8): 1, np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
_CHUNK = 1 << 20


def write_index(path: Path, dtype: np.dtype[Any], count: int, lengths: Iterable[npt.NDArray[Any]]) -> None:
    """One sequence per document.

    dtype: of the tokens.   count: number of documents.   lengths: their tokens, in parts of any size.
    """
    with open(path, "wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[dtype], count, count + 1))
        for part in lengths:
            stream.write(part.astype("<i4").tobytes())
        assert stream.tell() == HEADER.size + 4 * count, "lengths and count disagree"
        stream.flush()
        position = 0
        for begin in range(0, count, _CHUNK):
            # Read, not mapped: a mapped file counts as memory of this process, 4 bytes per document.
            written = np.fromfile(path, "<i4", min(_CHUNK, count - begin), offset=HEADER.size + 4 * begin)
            sizes = written.astype(np.int64) * dtype.itemsize
            stream.write((position + np.cumsum(sizes) - sizes).astype("<i8").tobytes())
            position += int(sizes.sum())
        for begin in range(0, count + 1, _CHUNK):
            stream.write(np.arange(begin, min(begin + _CHUNK, count + 1), dtype="<i8").tobytes())
