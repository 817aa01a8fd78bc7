"""Writing a checkpoint of weights in one process, one piece in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_train.checkpoint.index import check_covered
from moe_train.checkpoint.store import finish
from moe_train.checkpoint.writing import LazyBox, write_boxes
from moe_train.data.files import write_atomically


def write_weights(root: Path, step: int, boxes: Iterable[LazyBox], state: dict[str, Any]) -> Path:
    """Writes root/step_XXXXXXXX and root/latest, in this process alone; files are on the disk when it returns.

    The boxes of a key must be disjoint, cover it, and have one type. They are read in the order given. What fails
    leaves a part behind: write into a folder that is moved to its place afterwards.

    Errors: OSError where it cannot be written; whatever ``LazyBox.read`` raises.
    """
    directory = root / f"step_{step:08d}"
    directory.mkdir(parents=True)
    index = write_boxes(directory, "__0_", boxes)
    check_covered(index)
    finish(directory, index, {"step": step, **state, "weights_only": True})
    write_atomically(root / "latest", directory.name.encode())
    return directory


def untrained_state(config: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint of weights that no step was taken with; ``config``: of its run."""
    return {
        "consumed_samples": 0,
        "tokens": 0,
        "samples": {},
        "optimizer_steps": 0,
        "layout": {"processes": 1, "expert": 1, "zero_stage": 1, "device": "cpu"},
        "config": config,
        "history": [],
    }
