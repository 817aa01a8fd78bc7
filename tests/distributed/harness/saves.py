"""Checkpoints of one small tensor, for what depends on their names, times and pointers alone."""

from __future__ import annotations

import unittest.mock
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_train.checkpoint import store
from moe_train.checkpoint.retention import Retention
from moe_train.checkpoint.saver import CheckpointError, Saver
from moe_train.checkpoint.slices import OwnedSlice


@dataclass(frozen=True)
class Save:
    step: int
    clock: float = 0.0
    """Seconds since the epoch."""
    best: bool = False
    """Weights alone, which `best` names afterwards."""
    final: bool = False
    """Weights alone, of the end."""


def save_in_turn(root: str, saves: list[Save], keep: int) -> list[str]:
    """Each save in a folder; what was raised, empty where nothing was."""
    to = Saver(Path(root), Retention(newest=keep))
    raised = []
    for one in saves:
        owned = OwnedSlice("model.a", (3,), 0, torch.full((3,), float(one.step)))
        state: dict[str, Any] = {"final": True} if one.final else {}
        how: dict[str, Any] = {}
        if one.best or one.final:
            how = {"kind": store.WEIGHTS, "pointers": (store.BEST,) if one.best else ()}
        with unittest.mock.patch("time.time", lambda clock=one.clock: clock):
            try:
                to.save(one.step, [owned], state, **how)
                raised.append("")
            except CheckpointError as error:
                raised.append(str(error))
    return raised
