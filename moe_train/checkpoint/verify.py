"""Whether the files of a checkpoint are what was written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from moe_train.checkpoint.index import INDEX, Index, read_index
from moe_train.checkpoint.state import has_index, read_state
from moe_train.data.files import xxh3_of


def damages(directory: Path) -> Iterator[str]:
    """What is wrong with a checkpoint, a line each; reads all of it."""
    try:
        state = read_state(directory)
        index = read_index(directory)
        if not has_index(state, (directory / INDEX).read_bytes()):
            yield f"{INDEX} is not the one that belongs to this checkpoint"
    except (ValueError, OSError) as error:
        yield str(error)
        return
    for name in index.files:
        try:
            yield from damaged_files(directory, index, [name])
        except OSError as error:
            yield f"{name} cannot be read ({error.strerror or error})"


def damaged_files(directory: Path, index: Index, names: Iterable[str]) -> Iterator[str]:
    """Those of the named files that are not as written, with what is wrong. OSError where one cannot be read."""
    for name in names:
        wanted, path = index.files[name], directory / name
        size = os.stat(path).st_size
        if size != wanted.bytes:
            yield f"{name} has {size:,} bytes, and {wanted.bytes:,} were written"
            continue
        with open(path, "rb") as stream:
            if xxh3_of(stream) != wanted.xxh3:
                yield f"{name} is damaged: its checksum is another one"
