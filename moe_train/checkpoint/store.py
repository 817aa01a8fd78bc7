"""Checkpoints on disk: <run>/checkpoints/step_00000100/ and the pointer `latest`.

A checkpoint is written under a temporary name, renamed when every rank has finished, and only then named by
`latest`; a save that is cut off at any instant leaves the previous one as it was.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moe_train.checkpoint.planners import SliceLoadPlanner, SliceSavePlanner, check_geometry
from moe_train.checkpoint.slices import OwnedSlice
from moe_train.data.files import write_atomically

FORMAT = 2
STATE = "state.json"
_TEMPORARY = ".saving"
_REPLACED = ".replaced"


class CheckpointError(OSError):
    """A checkpoint could not be written; what was there before is untouched."""


def save(root: Path, step: int, slices: list[OwnedSlice], state: dict[str, Any], *, keep: int) -> Path:
    """Writes one checkpoint together with all ranks and keeps the newest ``keep``; collective.

    Raises CheckpointError on every rank when any rank fails.
    """
    final = root / f"step_{step:08d}"
    temporary = final.with_name(final.name + _TEMPORARY)

    def prepare() -> None:
        root.mkdir(parents=True, exist_ok=True)
        _tidy(root)
        temporary.mkdir()

    def publish() -> None:
        text = json.dumps({"format": FORMAT, "step": step, **state}, indent=1)
        write_atomically(temporary / STATE, text.encode())
        if final.exists():
            # A run that went back to an earlier step comes by again. Until the new one is in place the old one stays.
            os.rename(final, final.with_name(final.name + _REPLACED))
        os.rename(temporary, final)
        _sync_directory(root)
        write_atomically(root / "latest", final.name.encode())
        old = [path for path in sorted(root.glob("step_????????"))[:-keep] if path != final]
        for path in [*old, *root.glob(f"*{_REPLACED}")]:
            try:
                shutil.rmtree(path)
            except OSError as error:
                print(f"moe-train: old checkpoint {path} could not be removed: {error}", file=sys.stderr, flush=True)

    _together(prepare if dist.get_rank() == 0 else None, final)
    try:
        dcp.save({}, storage_writer=dcp.FileSystemWriter(temporary, sync_files=True), planner=SliceSavePlanner(slices))
    except (Exception, CheckpointException) as error:  # the latter, on every rank, carries what failed on any
        raise CheckpointError(_failure(final, _cause(error))) from error
    _together(publish if dist.get_rank() == 0 else None, final)
    return final


def load(directory: Path, slices: list[OwnedSlice], expected: dict[str, tuple[int, ...]]) -> None:
    """Fills the slices of this rank from a checkpoint that any layout wrote; collective.

    ``expected``: global name -> shape of everything that all ranks together want; it must equal what is stored.
    """
    reader = dcp.FileSystemReader(directory)
    try:
        metadata = reader.read_metadata()
        check_geometry(metadata, expected, str(directory))
        dcp.load({}, storage_reader=reader, planner=SliceLoadPlanner(slices))
    except ValueError:
        raise
    except (Exception, CheckpointException) as error:
        reason = str(_cause(error)).strip() or type(error).__name__
        raise ValueError(
            f"checkpoint {directory} cannot be read ({reason}); choose another with --resume PATH"
        ) from error


def read_state(directory: Path) -> dict[str, Any]:
    """The non-tensor state of a checkpoint. Raises ValueError when it is not one of ours or of another format."""
    try:
        state = json.loads((directory / STATE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} is not a checkpoint of moe_train ({error})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{directory} is not a checkpoint of moe_train ({STATE} holds no object)")
    if state.get("format") != FORMAT:
        raise ValueError(f"{directory} has checkpoint format {state.get('format')}; this version reads {FORMAT}")
    return state


def read_state_with_config(directory: Path) -> dict[str, Any]:
    """Likewise, for who needs the step and the configuration only: ValueError too where these are missing."""
    state = read_state(directory)
    for key, kind in {"config": dict, "step": int}.items():
        if not isinstance(state.get(key), kind):
            raise ValueError(f"{directory / STATE} is damaged: {key} is {state.get(key)!r}")
    return state


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Global name -> shape of every tensor of a checkpoint."""
    metadata = dcp.FileSystemReader(directory).read_metadata()
    entries = metadata.state_dict_metadata.items()
    return {key: tuple(entry.size) for key, entry in entries if isinstance(entry, TensorStorageMetadata)}


def latest(root: Path) -> Path | None:
    """The checkpoint that `latest` names, or None when nothing was saved yet."""
    pointer = root / "latest"
    if not pointer.exists():
        return None
    directory = root / pointer.read_text().strip()
    replaced = directory.with_name(directory.name + _REPLACED)
    if not directory.is_dir() and replaced.is_dir():
        return replaced  # a save ended between the two renames
    if not directory.is_dir():
        raise ValueError(f"{pointer} names {directory.name}, which does not exist; choose another with --resume PATH")
    return directory


def checkpoint_at(path: Path, step: int | None = None) -> Path:
    """The checkpoint that a path names: itself, or of a run folder the latest or that of ``step``.

    Errors: ValueError where there is none.
    """
    if (path / STATE).is_file():
        if step is not None:
            raise ValueError(f"{path} is one checkpoint; a step is chosen in the folder of a run")
        return path
    root = path / "checkpoints"
    found = latest(root) if step is None else root / f"step_{step:08d}"
    if found is None or not (found / STATE).is_file():
        there = ", ".join(sorted(p.name for p in root.glob("step_????????"))) or "none"
        which = "" if step is None else f" of step {step}"
        raise ValueError(
            f"{path} holds no checkpoint{which} (there: {there}): name a run's folder or a checkpoint in it"
        )
    return found


def _tidy(root: Path) -> None:
    """What saves that were cut off have left: unfinished ones go, one that was about to be replaced comes back."""
    for path in root.glob(f"*{_TEMPORARY}"):
        shutil.rmtree(path)
    for path in root.glob(f"*{_REPLACED}"):
        original = path.with_name(path.name.removesuffix(_REPLACED))
        if original.exists():
            shutil.rmtree(path)
        else:
            os.rename(path, original)


def _together(action: Callable[[], None] | None, final: Path) -> None:
    """Runs an action on one rank; if it fails, every rank raises."""
    message: list[str | None] = [None]
    if action is not None:
        try:
            action()
        except OSError as error:
            message = [_failure(final, error)]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(message, src=0)
    if message[0] is not None:
        raise CheckpointError(message[0])


def _cause(error: BaseException) -> BaseException:
    """What went wrong on the first rank that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def _failure(final: Path, error: BaseException) -> str:
    reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    if "unexpected pos" in reason or "PytorchStreamWriter" in reason:
        # torch's writer of tensor files hides the system's error behind its own.
        reason = f"a file could not be written in full, most often: No space left on device (torch: {reason})"
    return (
        f"checkpoint {final} could not be saved: {reason}. Earlier checkpoints are untouched; free space or choose "
        "another --run-dir, then go on with --resume auto"
    )


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
