"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_train.data.files import PARTIAL_SUFFIX, is_abandoned, process_name, sync


def check_target(target: Path, *, force: bool, ours: Callable[[Path], bool], what: str) -> None:
    """Errors: ValueError where ``target`` is there already and may not be replaced: without ``force``, or where
    ``ours`` says that it is something else than ``what``."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; choose the name of a folder")
    if not force:
        raise ValueError(f"{target} exists already: choose another folder, or replace it by --force")
    if not ours(target):
        raise ValueError(f"{target} is not {what}, so --force does not replace it: choose another folder")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the body ends, and is removed when it raises.

    What processes of this machine that were killed have left for the same target is removed at the start.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    for path in target.parent.glob(f".{target.name}.*{PARTIAL_SUFFIX}"):
        if is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
    temporary = target.with_name(f".{target.name}.{process_name()}{PARTIAL_SUFFIX}")
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, files in os.walk(temporary):
            for name in files:
                sync(Path(folder, name))
            sync(Path(folder))
        _replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace(temporary: Path, target: Path) -> None:
    """Puts a folder in the place of another one, which is away only between two renames."""
    old = temporary.with_name(f"{temporary.name}.old{PARTIAL_SUFFIX}")
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(temporary, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
