"""The files that documents' tokens are written to: one per split and stream, which neighbouring parts may share.

A shared file that becomes a whole shard need not be copied when the parts are put together.

Suffixes: D documents.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from moe_train.data.files import PARTIAL_SUFFIX, process_name

_PIECES_OF_MEMORY = os.sysconf("SC_IOV_MAX")
"""Most that one call may write."""

TOKENS, LOSS = "bin", "loss"
"""Streams of a part: token ids, and whether each counts in the loss (instruction data)."""
_SUFFIXES = (f".{TOKENS}", f".{LOSS}")


@dataclass(frozen=True)
class Segment:
    """Where a piece's values of a split and stream lie, or some of them."""

    file: str
    start: int
    """Bytes."""
    count: int
    """Bytes."""
    xxh3_128: str


def stream_key(split: int, stream: str) -> str:
    return f"{split}.{stream}"


def fill_shards(ends_D: npt.NDArray[np.int64], filled: int | None, limit: int | None) -> Iterator[tuple[int, int]]:
    """Documents (from, to) that go into each shard: the one begun, which holds so many tokens (None: no document), and
    those behind it.

    Another shard begins before a document that would bring one above its limit. ``ends_D`` are the documents' ends.
    """
    if limit is None:
        yield 0, len(ends_D)
        return
    begin, before = 0, 0
    while True:
        stop = int(np.searchsorted(ends_D, before + limit - (filled or 0), side="right"))
        if stop == begin < len(ends_D) and filled is None:
            stop += 1  # a document that is larger than a shard
        yield begin, stop
        if stop == len(ends_D):
            return
        begin, before, filled = stop, int(ends_D[stop - 1]) if stop else 0, None


def remove_unused(folder: Path, used: Collection[str]) -> None:
    """Takes away files that no part names: of processes that ended before they wrote its facts, and of cut parts, which
    are always done anew. For a process that has the folder to itself."""
    for path in folder.glob("[0-9]*.*"):
        if path.suffix in _SUFFIXES and path.name not in used:
            path.unlink()


class Runs:
    """Written by one process, part after part. With ``shard_tokens`` files end where shards do, as far as can be told
    from what this object has seen."""

    def __init__(self, folder: Path, shard_tokens: int | None) -> None:
        self._folder, self._limit = folder, shard_tokens
        self._open: dict[tuple[int, str], _Run] = {}
        self._filled: dict[int, int] = {}
        """Tokens of each split's open file, where it has documents."""
        self._ended: list[_Run] = []
        """With values of the part that is being written."""

    def write(
        self,
        stem: str,
        split: int,
        streams: Mapping[str, npt.NDArray[Any]],
        ends_D: npt.NDArray[np.int64],
        own_D: npt.NDArray[np.bool_],
    ) -> None:
        """Appends those of the documents that are the split's own, under a name of this stem where a file begins."""
        own_ends = np.cumsum(np.diff(ends_D, prepend=0)[own_D])
        places = np.flatnonzero(own_D)
        for number, (begin, stop) in enumerate(fill_shards(own_ends, self._filled.get(split), self._limit)):
            if number:
                self._end(split)
            if begin == stop:
                continue
            some_D = np.zeros_like(own_D)
            some_D[places[begin:stop]] = True
            before = int(own_ends[begin - 1]) if begin else 0
            self._filled[split] = self._filled.get(split, 0) + int(own_ends[stop - 1]) - before
            for stream, values in streams.items():
                key = (split, stream)
                if key not in self._open:
                    self._open[key] = _Run(self._folder, stem, stream_key(split, stream))
                self._open[key].write(values, ends_D, some_D)

    def segments(self) -> dict[str, list[Segment]]:
        """Split and stream -> where the part's values are, in order, in files that have their names."""
        segments: dict[str, list[Segment]] = {}
        for run in (*self._ended, *self._open.values()):
            if run.size > run.start:
                segments.setdefault(run.key, []).append(run.segment())
        return segments

    def keep_part(self) -> None:
        """The part's values are to stay, as its facts are written."""
        ended, self._ended = self._ended, []
        for run in (*ended, *self._open.values()):
            run.keep()
        for run in ended:
            run.discard()  # of which there is nothing, but for a file without a value

    def discard_part(self) -> None:
        """Takes away what was written since the last part, and lets the next one begin new files."""
        runs = (*self._ended, *self._open.values())
        self._ended, self._open, self._filled = [], {}, {}
        for run in runs:
            run.discard()

    close = discard_part

    def _end(self, split: int) -> None:
        for key in [key for key in self._open if key[0] == split]:
            self._ended.append(self._open.pop(key))
            self._ended[-1].end()
        self._filled.pop(split, None)


class _Run:
    """A file that grows. It has a temporary name, with the process in it, until a part of it is to stay."""

    def __init__(self, folder: Path, stem: str, key: str) -> None:
        # Never the name of another one: that may be a finished shard already.
        self.path, self.key = folder / f"{stem}.{secrets.token_hex(4)}.{key}", key
        self.start = self.size = 0
        """Where the part that is being written begins; bytes of the file."""
        self._temporary = self.path.with_name(f"{self.path.name}.{process_name()}{PARTIAL_SUFFIX}")
        self._stream = open(self._temporary, "xb", buffering=0)
        self._digest = xxhash.xxh3_128()

    def write(self, values: npt.NDArray[Any], ends_D: npt.NDArray[np.int64], own_D: npt.NDArray[np.bool_]) -> None:
        """Appends the values of some documents, those of neighbours together and without a copy of them."""
        changes = np.flatnonzero(np.diff(own_D, prepend=False, append=False))
        places = (np.concatenate([[0], ends_D])[changes] * values.itemsize).reshape(-1, 2).tolist()
        letters = np.ascontiguousarray(values).data.cast("B")
        pieces = [letters[begin:end] for begin, end in places]
        for first in range(0, len(pieces), _PIECES_OF_MEMORY):
            some = pieces[first : first + _PIECES_OF_MEMORY]
            written = os.writev(self._stream.fileno(), some)
            count = sum(map(len, some))
            # One call may write less.
            left = memoryview(b"".join(some))[written:] if written < count else b""
            while left:
                left = left[self._stream.write(left) :]
            for piece in some:
                self._digest.update(piece)
            self.size += count

    def segment(self) -> Segment:
        if not self.start:
            os.replace(self._temporary, self.path)
        return Segment(self.path.name, self.start, self.size - self.start, self._digest.hexdigest())

    def keep(self) -> None:
        self.start = self.size
        self._digest.reset()

    def end(self) -> None:
        """Nothing more comes: a part may fill more shards than a process may have files open."""
        self._stream.close()

    def discard(self) -> None:
        """Closes the file, without what is not to stay."""
        self._stream.close()
        if not self.start:
            self._temporary.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
        elif self.path.stat().st_size > self.start:
            os.truncate(self.path, self.start)
