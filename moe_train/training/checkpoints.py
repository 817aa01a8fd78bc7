"""When a run saves, what, and what happens where that fails."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_train.checkpoint import store
from moe_train.checkpoint.retention import Retention
from moe_train.checkpoint.saver import CheckpointError, Saver, UnsharedError, unshared
from moe_train.checkpoint.shared import blind_hosts
from moe_train.checkpoint.state import read_state
from moe_train.parallel.first_rank import from_rank_0
from moe_train.training.engine import Engine
from moe_train.training.options import CheckpointOptions
from moe_train.training.state import run_slices, run_state, weight_slices

Record = dict[str, Any]


def check_disk(options: CheckpointOptions, root: Path) -> None:
    """Before the first step: whether the machines of all ranks see the folder that checkpoints go to. Collective.

    CheckpointError, on every rank, where one does not and the run is to stop for that; else rank 0 warns.
    """
    if not (blind := blind_hosts(root.parent)):
        return
    message = unshared(root, blind)
    if options.on_error == "stop":
        raise CheckpointError(f"{message}. With checkpoint.on_error=continue the run trains, and saves nothing")
    if dist.get_rank() == 0:
        print(f"moe-train: warning: {message}. This run will save nothing", file=sys.stderr, flush=True)


def _best_loss(root: Path) -> tuple[float, str]:
    """Of the weights that `best` names; infinite without any, and why where they are not what it names."""
    try:
        best = store.named_by(root, store.BEST)
        return (math.inf if best is None else float(read_state(best).get("validation_loss", math.inf))), ""
    except ValueError as error:
        return math.inf, str(error)


class Checkpoints:
    """The checkpoints of one run. Everything but ``is_due`` is collective: all ranks call it alike.

    Records (kind "checkpoint") are of saves that are in place: ``stall_seconds`` that training waited for, and
    ``seconds`` until the checkpoint was in place.
    """

    def __init__(self, options: CheckpointOptions, root: Path, engine: Engine) -> None:
        self.options, self.root, self.engine = options, root, engine
        retention = Retention(options.keep, options.keep_every_steps, options.keep_every_hours)
        self.saver = Saver(root, retention, asynchronous=options.asynchronous)
        self.lowest_loss = math.inf
        """Of the validations so far."""
        self.newest: Path | None = None
        """The last one of the whole run that these weights have behind them: saved here, or gone on with."""
        self._last = time.monotonic()
        self._begun: dict[str, Any] = {}
        self._needed = False
        """What is being saved is what the run ends with."""

    def restore_best(self) -> None:
        """Of a run that goes on: the loss that its best weights have."""
        if not self.options.best:
            return
        self.lowest_loss, warning = from_rank_0(lambda: _best_loss(self.root))
        if warning and dist.get_rank() == 0:
            print(f"moe-train: warning: {warning}; the next validation is the best so far", file=sys.stderr, flush=True)

    def is_due(self) -> bool:
        """Whether this rank's clock wants a save; the ranks' clocks differ, so all must agree on it."""
        minutes = self.options.every_minutes
        return minutes > 0 and time.monotonic() - self._last >= 60 * minutes

    def wanted(self, step: int, *, asked: bool, last: bool) -> bool:
        """Whether a checkpoint of this step is to be saved."""
        every = self.options.every_steps
        return last or asked or bool(every and step % every == 0)

    def save(self, step: int, state: dict[str, Any], *, last: bool = False, final: bool = False) -> list[Record]:
        """A checkpoint of the whole run; ``state``: arguments of run_state. ``last``: the process ends after it, so
        that it must not fail whatever the run does about others; ``final``: it is of the run's last step.
        CheckpointError where one cannot be written and the run is to stop then."""
        records = self.finish()
        self._needed = last
        records += self._begin(step, run_slices(self.engine), run_state(self.engine, **state))
        self._last = time.monotonic()
        if final and self.options.final_weights:
            records += self._save_weights(step, state, (), {"final": True})
        return records

    def save_if_best(self, step: int, state: dict[str, Any], loss: float) -> list[Record]:
        """The weights alone, where the validation loss is the lowest so far."""
        if not self.options.best or not loss < self.lowest_loss:
            return []
        self.lowest_loss, self._needed = loss, False
        return self._save_weights(step, state, (store.BEST,), {"validation_loss": loss})

    def poll(self) -> list[Record]:
        """After each step: puts what was written meanwhile in place."""
        try:
            return self._placed(self.saver.poll())
        except CheckpointError as error:
            return self._failed(error)

    def finish(self) -> list[Record]:
        """Waits for what is being written."""
        try:
            return self._placed(self.saver.wait())
        except CheckpointError as error:
            return self._failed(error)

    def _save_weights(
        self, step: int, state: dict[str, Any], pointers: tuple[str, ...], more: dict[str, Any]
    ) -> list[Record]:
        whole = run_state(self.engine, **state) | {"weights_only": True} | more
        return self._begin(step, weight_slices(self.engine), whole, kind=store.WEIGHTS, pointers=pointers)

    def _begin(self, step: int, slices: Any, state: dict[str, Any], **how: Any) -> list[Record]:
        records = self.finish()
        self._begun = {"step": step, "began": time.monotonic()}
        try:
            self.saver.save(step, slices, state, **how)
        except CheckpointError as error:
            return records + self._failed(error)
        self._begun["stall_seconds"] = time.monotonic() - self._begun["began"]
        if self.options.asynchronous:
            return records
        return records + self._placed(store.folder_of(self.root, step, how.get("kind", store.STEP)))

    def _placed(self, path: Path | None) -> list[Record]:
        if path is None:
            return []
        begun, self._begun = self._begun, {}
        if path.name.startswith(store.STEP):
            self.newest = path
        return [
            {
                "kind": "checkpoint",
                "step": begun["step"],
                "name": path.name,
                "stall_seconds": begun["stall_seconds"],
                "seconds": time.monotonic() - begun["began"],
            }
        ]

    def _failed(self, error: CheckpointError) -> list[Record]:
        """On every rank alike."""
        begun, self._begun = self._begun, {}
        # A run that shares no disk has said at its beginning that it saves nothing.
        needed = self._needed and not isinstance(error, UnsharedError)
        if self.options.on_error == "stop" or needed:
            raise error
        return [{"kind": "checkpoint", "step": begun["step"], "error": str(error)}]
