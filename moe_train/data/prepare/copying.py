"""Bytes of one file to the end of another, by the kernel: they do not pass through this process."""

from __future__ import annotations

import errno
import os
from typing import BinaryIO

_NOT_HERE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}
_CHUNK = 1 << 20


def append_range(source: BinaryIO, target: BinaryIO, start: int, count: int) -> None:
    """``target`` is unbuffered and stands at its end. ValueError where ``source`` ends too early."""
    while count:
        copied = _copy(source, target, start, count)
        if not copied:
            raise ValueError(f"{source.name} is shorter than its table says: delete its folder and run again")
        start, count = start + copied, count - copied


def _copy(source: BinaryIO, target: BinaryIO, start: int, count: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source.fileno(), target.fileno(), count, start)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
    # File systems that cannot (and systems other than Linux).
    content = os.pread(source.fileno(), min(count, _CHUNK), start)
    return target.write(content)
