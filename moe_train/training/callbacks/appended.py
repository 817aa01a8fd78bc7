"""A file that one process appends to, of which a write that fails leaves no part."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


class Appended:
    """Opened for each piece: closing it is when network disks report what they could not write, and a handle that went
    stale while the disk was away is not met again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole: int | None = None
        """Length of the file before a write that failed; what lies behind it is cut off."""

    def append(self, content: bytes) -> None:
        """Writes all of it, or raises OSError and leaves none of it: what the disk does not let us cut off at once is
        cut off before the next write."""
        try:
            with open(self.path, "ab", buffering=0) as file:
                self._cut(file.fileno())
                self._whole = os.fstat(file.fileno()).st_size
                rest = memoryview(content)
                while rest:
                    rest = rest[file.write(rest) or 0 :]
        except OSError:
            with suppress(OSError), open(self.path, "r+b", buffering=0) as file:
                self._cut(file.fileno())
            raise
        self._whole = None

    def _cut(self, descriptor: int) -> None:
        if self._whole is not None and os.fstat(descriptor).st_size > self._whole:
            os.ftruncate(descriptor, self._whole)
