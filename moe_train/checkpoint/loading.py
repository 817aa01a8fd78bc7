"""Filling a rank's slices from a checkpoint that any layout wrote."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from moe_train.checkpoint.index import INDEX
from moe_train.checkpoint.reading import StoredTensors
from moe_train.checkpoint.slices import OwnedSlice, cut
from moe_train.checkpoint.state import has_index, read_state
from moe_train.checkpoint.verify import damaged_files
from moe_train.parallel.passing import PassingError, may_pass

Shapes = dict[str, tuple[int, ...]]


def load(directory: Path, slices: list[OwnedSlice], expected: Shapes, *, verify: bool = True) -> None:
    """Fills the slices of this rank; collective.

    ``expected``: global name -> shape of everything that all ranks together want; it must equal what is stored.
    ``verify``: compares all files with their checksums first, each rank its share of them.
    Errors: ValueError, on every rank, where it is of another model, damaged or cannot be read on any; PassingError, on
    every rank, where nothing worse has happened than that the disk was away.
    """
    wrong = away = None
    try:
        _load(directory, slices, expected, verify)
    except ValueError as error:
        wrong = str(error)
    except OSError as error:
        if may_pass(error):
            away = f"checkpoint {directory} cannot be read now ({error}); start again when the disk answers"
        else:
            wrong = f"checkpoint {directory} cannot be read ({error}); choose another with --resume PATH"
    if (text := _first(wrong)) is not None:
        raise ValueError(text)
    if (text := _first(away)) is not None:
        raise PassingError(text)


def _first(text: str | None) -> str | None:
    """This rank's text, or that of the first rank that has one; collective."""
    texts: list[str | None] = [text]
    if _world_size() > 1:
        texts = [None] * _world_size()
        dist.all_gather_object(texts, text)
    return text if text is not None else next((other for other in texts if other is not None), None)


def _load(directory: Path, slices: list[OwnedSlice], expected: Shapes, verify: bool) -> None:
    state = read_state(directory)
    with StoredTensors(directory) as stored:
        if not has_index(state, (directory / INDEX).read_bytes()):
            raise ValueError(f"checkpoint {directory} is damaged: {INDEX} is not the one that belongs to it")
        check_geometry(stored.shapes, expected, str(directory))
        if verify:
            mine = sorted(stored.index.files)[_rank() :: _world_size()]
            damage = next(damaged_files(directory, stored.index, mine), None)
            if damage is not None:
                raise ValueError(f"checkpoint {directory}: {damage}; choose another with --resume PATH")
        for owned in slices:
            for box in cut(owned):
                stored.read(box.key, box.offsets, box.data)


def check_geometry(stored: Shapes, expected: Shapes, where: str) -> None:
    """Raises ValueError when ``expected`` and the stored tensors of the same kinds differ in names or shapes."""
    kinds = {key.partition(".")[0] for key in expected}
    stored = {key: shape for key, shape in stored.items() if key.partition(".")[0] in kinds}
    problems = [f"missing in the checkpoint: {key}" for key in sorted(expected.keys() - stored.keys())]
    problems += [f"not in this model: {key}" for key in sorted(stored.keys() - expected.keys())]
    problems += [
        f"{key}: shape {stored[key]} in the checkpoint, {expected[key]} in this model"
        for key in sorted(expected.keys() & stored.keys())
        if stored[key] != expected[key]
    ]
    if problems:
        shown = "\n  ".join(problems[:10] + ([f"… and {len(problems) - 10} more"] if len(problems) > 10 else []))
        raise ValueError(
            f"checkpoint {where} is of another model:\n  {shown}\nUse the configuration that it was trained with "
            "(config.yaml in its run folder)."
        )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
