"""The folder of a run's checkpoints: names, pointers, and how a finished one is put in place.

checkpoints/
  step_00000100/           a checkpoint: tensors (*.distcp), index.json, .metadata (for torch's tools), state.json
  weights_00000120/        weights alone, of a step that was the best so far, or of the end
  step_00000150.saving/    one that is being written, or was when the run ended
  step_00000050.removing/  one that is being deleted, likewise
  latest, best             name a folder; written last, so that what they name is complete
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_train.checkpoint.index import INDEX, Index, index_bytes
from moe_train.checkpoint.retention import Saved
from moe_train.checkpoint.state import STATE, read_state, state_bytes
from moe_train.checkpoint.torch_index import METADATA, torch_index_bytes
from moe_train.data.files import sync, write_atomically

LATEST, BEST = "latest", "best"
STEP, WEIGHTS = "step_", "weights_"
_NAME = re.compile(rf"({STEP}|{WEIGHTS})\d+")
_SAVING = ".saving"
_REPLACED = ".replaced"
_REMOVING = ".removing"
_told: set[Path] = set()
"""What could not be removed: each save tries again, but says no more."""


def folder_of(root: Path, step: int, kind: str = STEP) -> Path:
    return root / f"{kind}{step:08d}"


def temporary_of(final: Path) -> Path:
    """Where a checkpoint is written until it is complete."""
    return final.with_name(final.name + _SAVING)


def steps_of(root: Path, kind: str = STEP) -> list[int]:
    """Steps of the complete checkpoints, rising."""
    return sorted(int(path.name.removeprefix(kind)) for path in root.glob(f"{kind}????????") if _is_number(path, kind))


def _is_number(path: Path, kind: str) -> bool:
    return path.name.removeprefix(kind).isdigit() and (path / STATE).is_file()


def latest(root: Path) -> Path | None:
    """The newest checkpoint, or None when nothing was saved yet. ValueError where `latest` names none.

    Where `latest` is missing (a copy without it, or a run that was killed between its first checkpoint and that) it is
    the complete one that was saved last: to begin anew would in the end delete it.
    """
    if (root / LATEST).exists():
        return named_by(root, LATEST)
    # One that is away for a moment must not let the run go on from an older one: that is an OSError.
    found = _saved(root, (ValueError,))
    return folder_of(root, max(found, key=lambda one: (one.at, one.step)).step) if found else None


def readable(root: Path) -> list[Saved]:
    """The complete checkpoints, by step; without those of other formats, damaged ones and those that are away for a
    moment, which nobody may judge."""
    return _saved(root, (ValueError, OSError))


def _saved(root: Path, unreadable: tuple[type[Exception], ...]) -> list[Saved]:
    found = []
    for step in steps_of(root):
        with suppress(*unreadable):
            found.append(Saved(step, float(read_state(folder_of(root, step)).get("saved_at", 0.0))))
    return found


def named_by(root: Path, pointer: str) -> Path | None:
    """The checkpoint that a pointer names, or None where there is none. ValueError where that does not exist, or it
    names anything but a checkpoint of this folder (it is read from a file, and what it names may be deleted)."""
    path = root / pointer
    if not path.exists():
        return None
    name = path.read_text(encoding="utf-8", errors="replace").strip()
    if not _NAME.fullmatch(name):
        raise ValueError(f"{path} names {name[:80]!r}, which is no checkpoint; choose one with --resume PATH")
    directory = root / name
    replaced = directory.with_name(directory.name + _REPLACED)
    if not directory.is_dir() and replaced.is_dir():
        return replaced  # a save ended between the two renames
    if not directory.is_dir():
        raise ValueError(f"{path} names {directory.name}, which does not exist; choose another with --resume PATH")
    return directory


def named_or_none(root: Path, pointer: str) -> Path | None:
    """Likewise, None too where it names none: for who only puts another in its place."""
    try:
        return named_by(root, pointer)
    except ValueError:
        return None


def weights_named_by(root: Path, pointers: Iterable[str]) -> list[Path]:
    """Weights that go when the pointers name others: those of the end of a run stay."""
    found = [path for pointer in pointers if (path := named_or_none(root, pointer))]
    return [path for path in found if path.name.startswith(WEIGHTS) and not are_of_the_end(path)]


def are_of_the_end(directory: Path) -> bool:
    """Whether these are weights of the end of a run, which stay; also where there are weights that cannot be read (of
    another format, damaged, on a disk that is away): nobody may judge them, and so they stay too."""
    if not directory.name.startswith(WEIGHTS) or not directory.is_dir():
        return False
    try:
        return read_state(directory).get("final") is not None
    except (OSError, ValueError):
        return True


def checkpoint_at(path: Path, step: int | None = None) -> Path:
    """The checkpoint that a path names: itself, or of a run folder the latest or that of ``step``.

    Errors: ValueError where there is none.
    """
    if (path / STATE).is_file():
        if step is not None:
            raise ValueError(f"{path} is one checkpoint; a step is chosen in the folder of a run")
        return path
    root = path / "checkpoints"
    found = latest(root) if step is None else folder_of(root, step)
    if found is None or not (found / STATE).is_file():
        there = ", ".join(sorted(p.name for p in root.glob("step_????????"))) or "none"
        which = "" if step is None else f" of step {step}"
        raise ValueError(
            f"{path} holds no checkpoint{which} (there: {there}): name a run's folder or a checkpoint in it"
        )
    return found


def finish(directory: Path, index: Index, state: dict[str, Any]) -> None:
    """Writes what makes a folder with tensors a checkpoint; state.json last."""
    content = index_bytes(index)
    write_atomically(directory / INDEX, content)
    write_atomically(directory / METADATA, torch_index_bytes(index))
    write_atomically(directory / STATE, state_bytes(state, content))


def begin(root: Path, final: Path) -> Path:
    """Makes the folder that a checkpoint is written into, and tidies up behind saves that were cut off. OSError where
    that cannot be made; not where old folders cannot be removed."""
    root.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(final)
    if temporary.exists():
        temporary.rename(_free(temporary))
    tidy(root)
    temporary.mkdir()
    return temporary


def put_in_place(final: Path, pointers: Iterable[str]) -> None:
    """Gives a finished folder its name, and lets the pointers name it."""
    if final.exists():
        # A run that went back to an earlier step comes by again. Until the new one is in place the old one stays.
        os.rename(final, final.with_name(final.name + _REPLACED))
    os.rename(temporary_of(final), final)
    sync(final.parent)
    for pointer in pointers:
        point(final, pointer)


def is_step(directory: Path) -> bool:
    """Whether it is called as a checkpoint to go on from is."""
    return directory.name.startswith(STEP) and _NAME.fullmatch(directory.name) is not None


def point(directory: Path, pointer: str) -> None:
    """Lets a pointer name this checkpoint."""
    write_atomically(directory.parent / pointer, directory.name.encode())


def remove(paths: Iterable[Path]) -> None:
    """What is not wanted any more; what cannot be removed is told, once, and stays."""
    for path in paths:
        try:
            if path.suffix != _REMOVING:
                # First its name: one that is cut off here is no checkpoint, and is found again.
                path = path.rename(_free(path))
            shutil.rmtree(path)
        except OSError as error:
            if path not in _told:
                print(f"moe-train: {path} could not be removed, and stays: {error}", file=sys.stderr, flush=True)
            _told.add(path)


def _free(path: Path) -> Path:
    """A name for what is being removed. One of before may be there still: of another owner, or with a file that is open
    on a network disk."""
    number = 1
    going = path.with_name(path.name + _REMOVING)
    while going.exists():
        number += 1
        going = path.with_name(f"{path.name}.{number}{_REMOVING}")
    return going


def replaced(root: Path) -> list[Path]:
    """Checkpoints whose place another one of the same step has taken."""
    return [path for path in root.glob(f"*{_REPLACED}") if path.with_name(_original(path)).exists()]


def tidy(root: Path) -> None:
    """What saves that were cut off have left: unfinished ones go, one that was about to be replaced comes back.

    What cannot be removed keeps no save from being written."""
    remove([path for kind in (_SAVING, _REMOVING) for path in root.glob(f"*{kind}")])
    remove(replaced(root))
    for path in root.glob(f"*{_REPLACED}"):
        if not (original := path.with_name(_original(path))).exists():
            os.rename(path, original)


def _original(path: Path) -> str:
    return path.name.removesuffix(_REPLACED)
