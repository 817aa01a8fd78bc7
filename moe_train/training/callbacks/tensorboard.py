"""TensorBoard files with the tags of docs/metrics.md and a heat map of the expert load."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_train.training.callbacks.base import Callback, Record, RunInfo, Status, write_error
from moe_train.training.callbacks.heatmap import load_image
from moe_train.training.callbacks.tags import scalar_tags

PROBE_BYTES = 1 << 16


class TensorBoardWriter(Callback):
    """``image_every``: records of kind "train" between two heat maps; 0 for none. The first record has one.

    A record is on the disk when ``on_record`` returns. The thread that TensorBoard writes with dies by its first
    failure: the next record then goes into a new file. (Points of a record that was cut off may be there twice.)
    """

    def __init__(self, folder: Path, image_every: int = 10) -> None:
        self.folder = folder
        self.image_every = image_every
        self._writer: Any = None
        self._train_records = 0
        self._broken = False

    def on_start(self, run: RunInfo) -> None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"logging.tensorboard is on, but TensorBoard cannot be imported ({error}): "
                "pip install tensorboard, or set logging.tensorboard=false"
            ) from None
        try:
            self._open(purge_step=run.start_step + 1)
        except OSError as error:
            self._broken = True
            raise write_error(self.folder, error) from None

    def on_record(self, record: Record) -> None:
        step = record["step"]
        try:
            if self._broken:
                self._open()
            for tag, value in scalar_tags(record).items():
                self._writer.add_scalar(tag, value, step)
            if record["kind"] == "train" and record.get("load"):
                if self.image_every and self._train_records % self.image_every == 0:
                    self._writer.add_image("balance/load", load_image(record["load"]), step, dataformats="HWC")
            self._writer.flush()
        except OSError as error:
            self._broken = True
            raise write_error(self.folder, error) from None
        self._train_records += record["kind"] == "train" and bool(record.get("load"))

    def _open(self, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._broken:
            if self._writer is not None:
                with suppress(OSError):
                    self._writer.close()
            # Each writer leaves a file, also one that fails: not one for each record of a disk that is still full.
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".probe"
            try:
                probe.write_bytes(bytes(PROBE_BYTES))
            finally:
                probe.unlink(missing_ok=True)
        self._writer = SummaryWriter(str(self.folder), purge_step=purge_step, flush_secs=30)
        self._broken = False

    def on_end(self, status: Status) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
