"""TensorBoard files with the tags of docs/metrics.md and a heat map of the expert load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_train.training.callbacks.base import Callback, Record, RunInfo, Status, write_error
from moe_train.training.callbacks.heatmap import load_image
from moe_train.training.callbacks.tags import scalar_tags


class TensorBoardWriter(Callback):
    """``image_every``: records of kind "train" between two heat maps; 0 for none. The first record has one."""

    def __init__(self, folder: Path, image_every: int = 10) -> None:
        self.folder = folder
        self.image_every = image_every
        self._writer: Any = None
        self._train_records = 0

    def on_start(self, run: RunInfo) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                f"logging.tensorboard is on, but TensorBoard cannot be imported ({error}): "
                "pip install tensorboard, or set logging.tensorboard=false"
            ) from None
        try:
            self._writer = SummaryWriter(str(self.folder), purge_step=run.start_step + 1, flush_secs=30)
        except OSError as error:
            raise write_error(self.folder, error) from None

    def on_record(self, record: Record) -> None:
        step = record["step"]
        try:
            for tag, value in scalar_tags(record).items():
                self._writer.add_scalar(tag, value, step)
            if record["kind"] == "train" and record.get("load"):
                if self.image_every and self._train_records % self.image_every == 0:
                    self._writer.add_image("balance/load", load_image(record["load"]), step, dataformats="HWC")
                self._train_records += 1
        except OSError as error:
            raise write_error(self.folder, error) from None

    def on_end(self, status: Status) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
