"""Files that appear under their final names only when they are complete."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import psutil
import xxhash

PARTIAL_SUFFIX = ".partial"


def partial_path(path: Path) -> Path:
    """The temporary name, in the same folder, that `path` is written under."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def publish(paths: Iterable[Path]) -> None:
    """Gives complete temporary files their final names, in the order given.

    Every file is on the disk before the first one is renamed, so a crash leaves either a prefix of the
    final files (all of them whole) or none. Put the file whose presence means "finished" last.
    """
    final = list(paths)
    for path in final:
        sync(partial_path(path))
    for path in final:
        os.replace(partial_path(path), path)
        # Where both are names of one file, as after a crash, nothing was renamed.
        partial_path(path).unlink(missing_ok=True)
    for folder in {path.parent for path in final}:
        sync(folder)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a small file: readers see the old content or the new one, never a part.

    The temporary name holds the process, so that several may write the same file at once. OSError names the file.
    """
    temporary = path.with_name(f"{path.name}.{process_name()}{PARTIAL_SUFFIX}")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        # A part of a file has no use, and others may wait for its space.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        # What writing raises names none.
        error.filename = error.filename or str(path)
        raise
    sync(path.parent)


def process_name() -> str:
    """Different for each process of all machines that share a folder."""
    return f"{platform.node()}.{os.getpid()}"


def is_abandoned(path: Path) -> bool:
    """Whether a temporary file is named (by `process_name`) for a process of this machine that is gone."""
    name, _, process = path.name.removesuffix(PARTIAL_SUFFIX).rpartition(".")
    return name.endswith(f".{platform.node()}") and process.isdigit() and not psutil.pid_exists(int(process))


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces.

    Errors: OSError if it cannot be read.
    """
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def xxh3_of(stream: BinaryIO) -> str:
    """Hexadecimal XXH3 of 128 bits of the rest of a stream: to tell that content is another or damaged, at the speed
    of memory; no proof against forgers."""
    return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]


def xxh3_of_range(path: Path, start: int, count: int) -> str:
    """Of so many bytes of a file, or of those that are there."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as stream:
        stream.seek(start)
        while count and (content := stream.read(min(count, 1 << 20))):
            digest.update(content)
            count -= len(content)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
