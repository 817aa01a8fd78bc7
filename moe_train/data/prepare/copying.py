"""Bytes of files into another, by the kernel: they do not pass through this process."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

FileRange = tuple[Path, int, int]
"""Path, first byte, number of bytes."""

_NOT_HERE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}
_CHUNK = 1 << 20


def join_ranges(ranges: Iterable[FileRange], target: Path, workers: int) -> None:
    """Ranges of files as one file: another name of the file that they are all of, or else copied, several at a time.

    Errors: OSError, ValueError where a file ends too early.
    """
    whole = list(_with_neighbours(ranges))
    target.unlink(missing_ok=True)  # one that a killed process left may be another name of what is read
    if len(whole) == 1 and _linked(*whole[0], target):
        return
    ends = list(itertools.accumulate(count for _, _, count in whole))
    with open(target, "wb", buffering=0) as joined, ThreadPoolExecutor(workers) as threads:
        copies = [
            threads.submit(_copy_range, path, start, count, joined, end - count)
            for (path, start, count), end in zip(whole, ends, strict=True)
        ]
        for copy in copies:
            copy.result()


def _with_neighbours(ranges: Iterable[FileRange]) -> Iterator[FileRange]:
    """Those that follow each other in their file are one."""
    last: FileRange | None = None
    for path, start, count in ranges:
        if last is not None and last[0] == path and last[1] + last[2] == start:
            last = (path, last[1], last[2] + count)
        else:
            if last is not None:
                yield last
            last = (path, start, count)
    if last is not None:
        yield last


def _linked(path: Path, start: int, count: int, target: Path) -> bool:
    if start or path.stat().st_size != count:
        return False
    try:
        os.link(path, target)
    except OSError:  # file systems that cannot
        return False
    return True


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
