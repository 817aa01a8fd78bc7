"""Bytes of files into another, by the kernel: they do not pass through this process."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

_NOT_HERE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}
_CHUNK = 1 << 20


def join_ranges(ranges: Sequence[tuple[Path, int, int]], target: Path, workers: int) -> None:
    """Writes ranges of files (path, first byte, number of bytes) as one file, several at a time.

    Errors: OSError, ValueError where a file ends too early.
    """
    ends = list(itertools.accumulate(count for _, _, count in ranges))
    with open(target, "wb", buffering=0) as joined, ThreadPoolExecutor(workers) as threads:
        copies = [
            threads.submit(_copy_range, path, start, count, joined, end - count)
            for (path, start, count), end in zip(ranges, ends, strict=True)
        ]
        for copy in copies:
            copy.result()


def _copy_range(path: Path, start: int, count: int, target: BinaryIO, to: int) -> None:
    with open(path, "rb") as source:
        while count:
            copied = _copy(source, target, start, count, to)
            if not copied:
                raise ValueError(f"{path} is shorter than its table says: delete its folder and run again")
            start, count, to = start + copied, count - copied, to + copied


def _copy(source: BinaryIO, target: BinaryIO, start: int, count: int, to: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source.fileno(), target.fileno(), count, start, to)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
    # File systems that cannot (and systems other than Linux).
    content = os.pread(source.fileno(), min(count, _CHUNK), start)
    return os.pwrite(target.fileno(), content, to) if content else 0
