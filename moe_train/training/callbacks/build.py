"""The callbacks that the configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_train.training.callbacks.base import Callback, Callbacks
from moe_train.training.callbacks.console import Console
from moe_train.training.callbacks.csv_file import CsvWriter
from moe_train.training.callbacks.jsonl import JsonlWriter
from moe_train.training.callbacks.keeps_trying import KeepsTrying
from moe_train.training.callbacks.tensorboard import TensorBoardWriter
from moe_train.training.callbacks.wandb_logger import WandbLogger
from moe_train.training.options import LoggingOptions
from moe_train.training.run_folder import METRICS


def build_callbacks(
    options: LoggingOptions, run_dir: Path, rank: int = 0, more: Sequence[Callback] = (), *, goes_on: bool = False
) -> Callbacks:
    """metrics.jsonl and the console always, the others by option, ``more`` last; none on ranks above 0.

    ``goes_on``: files that cannot be written do not end the run."""
    if rank != 0:
        return Callbacks()

    def file(writer: Callback, name: str) -> Callback:
        return KeepsTrying(writer, name) if goes_on else writer

    callbacks = [file(JsonlWriter(run_dir / METRICS), METRICS), Console(goes_on=goes_on)]
    if options.tensorboard:
        callbacks.append(file(TensorBoardWriter(run_dir / "tensorboard"), "tensorboard"))
    if options.csv:
        callbacks.append(file(CsvWriter(run_dir / "metrics.csv"), "metrics.csv"))
    if options.wandb:
        callbacks.append(WandbLogger())
    return Callbacks([*callbacks, *more])
