"""The callbacks that the configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_train.training.callbacks.base import Callback, Callbacks
from moe_train.training.callbacks.console import Console
from moe_train.training.callbacks.csv_file import CsvWriter
from moe_train.training.callbacks.jsonl import JsonlWriter
from moe_train.training.callbacks.tensorboard import TensorBoardWriter
from moe_train.training.callbacks.wandb_logger import WandbLogger
from moe_train.training.options import LoggingOptions


def build_callbacks(options: LoggingOptions, run_dir: Path, rank: int = 0, more: Sequence[Callback] = ()) -> Callbacks:
    """metrics.jsonl and the console always, the others by option, ``more`` last; none on ranks above 0."""
    if rank != 0:
        return Callbacks()
    callbacks: list[Callback] = [JsonlWriter(run_dir / "metrics.jsonl"), Console()]
    if options.tensorboard:
        callbacks.append(TensorBoardWriter(run_dir / "tensorboard"))
    if options.csv:
        callbacks.append(CsvWriter(run_dir / "metrics.csv"))
    if options.wandb:
        callbacks.append(WandbLogger())
    return Callbacks([*callbacks, *more])
