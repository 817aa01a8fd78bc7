"""Weights & Biases. Optional: needs the extra ``wandb``."""

from __future__ import annotations

from typing import Any

from moe_train.training.callbacks.base import Callback, Record, RunInfo, Status
from moe_train.training.callbacks.tags import scalar_tags


class WandbLogger(Callback):
    """Logs the tags of docs/metrics.md. A resumed run goes on in the same W&B run, whose id is kept in
    <run>/wandb_id. Project and account are W&B's own environment variables; the project is moe_train without one."""

    def __init__(self) -> None:
        self._run: Any = None

    def on_start(self, run: RunInfo) -> None:
        import os

        try:
            import wandb
        except ImportError:
            raise ValueError(
                "logging.wandb is on, but wandb is not installed: pip install moe-train[wandb], "
                "or set logging.wandb=false"
            ) from None
        id_file = run.run_dir / "wandb_id"
        run_id = id_file.read_text(encoding="utf-8").strip() if run.start_step and id_file.is_file() else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "moe_train"),
            name=run.name,
            id=run_id,
            resume="allow" if run_id else None,
            dir=str(run.run_dir),
            config=dict(run.config),
        )
        if self._run.id != run_id:
            id_file.write_text(f"{self._run.id}\n", encoding="utf-8")

    def on_record(self, record: Record) -> None:
        self._run.log(scalar_tags(record), step=record["step"])

    def on_end(self, status: Status) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if status != "failed" else 1)
            self._run = None
