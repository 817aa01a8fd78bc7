"""A folder that appears whole or not at all."""

from __future__ import annotations

import glob
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moe_train.data.files import PARTIAL_SUFFIX, is_abandoned, process_name, sync

_NEW, _OLD = "new", "old"
"""In names of temporary folders: what is being written, and what it replaces."""


def check_target(
    target: Path, *, force: bool, ours: Callable[[Path], bool], what: str, folders: tuple[str, ...] = ()
) -> None:
    """Errors: ValueError where nothing can be put at ``target``, or something is there already that may not be
    replaced: without ``force``, where ``ours`` says that it is something else than ``what``, or where it has other
    folders than ``folders``.

    What a process that was killed had moved away from there is put back first.
    """
    if target.is_symlink() and not target.exists():
        raise ValueError(f"{target} is a link to {os.readlink(target)}, which does not exist: choose another folder")
    resolved = target.resolve()
    if os.path.ismount(resolved):
        raise ValueError(f"{target} is a mount point, which cannot be replaced: choose a folder inside of it")
    _put_back(resolved)
    if not resolved.exists() or (resolved.is_dir() and not any(resolved.iterdir())):
        return
    if not resolved.is_dir():
        raise ValueError(f"{target} is a file; choose the name of a folder")
    if not force:
        raise ValueError(f"{target} exists already: choose another folder, or replace it by --force")
    if not ours(resolved):
        raise ValueError(f"{target} is not {what}, so --force does not replace it: choose another folder")
    others = sorted(path.name for path in resolved.iterdir() if path.is_dir() and path.name not in folders)
    if others:
        raise ValueError(
            f"{target} has a folder {others[0]}, which is no part of {what}, so --force does not replace it: choose "
            "another folder"
        )


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the body ends, and is removed when it raises.

    Where ``target`` is a link, what it leads to is replaced. What processes of this machine that were killed have left
    for the same target is removed at the start. Errors: ValueError at the end where somebody has put something else at
    ``target``, or anything into it, since the start; it stays as it is.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    _put_back(target)
    before = _state(target)
    for path in [*_left(target, _NEW), *_left(target, _OLD)]:
        shutil.rmtree(path, ignore_errors=True)
    temporary = _beside(target, _NEW)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, files in os.walk(temporary):
            for name in files:
                sync(Path(folder, name))
            sync(Path(folder))
        if _state(target) != before:
            raise ValueError(f"{target} was changed by another process meanwhile, and is not replaced")
        _replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace(temporary: Path, target: Path) -> None:
    """Puts a folder in the place of another one, which is away only between two renames."""
    old = _beside(target, _OLD)
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(temporary, target)
    except BaseException:
        if temporary.exists():
            if old.exists():
                os.rename(old, target)
            raise
    # Everything is done: who stops the rest must not be told that it is not. What stays is removed at the next start.
    with suppress(KeyboardInterrupt):
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)


def _state(target: Path) -> tuple[int, int, int] | None:
    """Another one when names in a folder have come or gone, or it is another folder; None without one."""
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}.{process_name()}{PARTIAL_SUFFIX}")


def _left(target: Path, kind: str) -> list[Path]:
    """What earlier processes have left; one with our number, as in a container that was started again, is gone too."""
    own = _beside(target, kind)
    paths = target.parent.glob(f".{glob.escape(f'{target.name}.{kind}.{platform.node()}')}.*{PARTIAL_SUFFIX}")
    return [path for path in paths if path == own or is_abandoned(path)]


def _put_back(target: Path) -> None:
    """A process that was killed between two renames has left the folder under its temporary name."""
    for old in _left(target, _OLD):
        if not target.exists():
            os.rename(old, target)
