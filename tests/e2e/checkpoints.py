"""Reads a checkpoint without the project's own reader, to compare two of them bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, whole; generator states excepted."""
    metadata = dcp.FileSystemReader(directory).read_metadata()
    state: dict[str, Any] = {
        key: torch.empty(value.size, dtype=value.properties.dtype)
        for key, value in metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata) and not key.startswith("rng.")
    }
    dcp.load(state, checkpoint_id=str(directory), no_dist=True)
    return state


def latest(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
