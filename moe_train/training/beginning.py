"""Where a run begins: where a checkpoint stopped, with the weights of another model, or with random ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_train.checkpoint import store
from moe_train.checkpoint.state import read_state_with_config
from moe_train.parallel.first_rank import from_rank_0
from moe_train.training.engine import Engine
from moe_train.training.history import Stretch, from_plain
from moe_train.training.initial import check_function
from moe_train.training.resume import check_samples
from moe_train.training.run_config import RunConfig
from moe_train.training.run_folder import CHECKPOINTS, initial_weights, lies_in, started_from
from moe_train.training.state import load_checkpoint, load_initial_weights


@dataclass(frozen=True)
class Beginning:
    step: int = 0
    """Optimizer steps that were taken."""
    tokens: int = 0
    history: list[Stretch] = field(default_factory=list)
    """Who took them."""
    checkpoint: Path | None = None
    """That was gone on with."""
    elsewhere: Path | None = None
    """The checkpoint, where it lies in another folder: that of another run, or of a model."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What the guard remembered."""
    validation_owed: bool = False
    """The run was stopped instead of validating after its last step."""
    notes: list[str] = field(default_factory=list)
    """For the user."""


def begin(
    engine: Engine,
    config: RunConfig,
    run_dir: Path,
    resume: str | None,
    init_from: Path | None,
    samples: dict[str, Any],
) -> Beginning:
    """Loads what a run begins with into the engine; collective.

    ``resume``: path of a checkpoint, or "auto" for the run's own latest one; without one the run begins anew, with the
    weights of ``init_from`` where that is given. Rank 0's word counts: the others may have been started otherwise (a
    node that is new after a restart), or not see the same folder. ``samples``: TrainingSet.identity() of the run.
    Errors: ValueError where a checkpoint cannot be read, is of a model that computes something else or has read other
    samples.
    """
    resume, directory, init_from = from_rank_0(lambda: _choice(run_dir, resume, init_from))
    if directory is not None:
        recorded = read_state_with_config(directory)["config"]
        state = load_checkpoint(engine, directory, verify=config.checkpoint.verify)
        size = config.train.global_batch_size
        notes = [
            _without_pointer(run_dir, directory) if resume == "auto" else "",
            check_function(recorded, config, str(directory)),
            check_samples(directory, state, samples, size, strict=resume == "auto"),
        ]
        return Beginning(
            step=state["step"],
            tokens=state["tokens"],
            history=from_plain(state.get("history", [])),
            checkpoint=directory,
            guard=state.get("guard", {}),
            validation_owed=state.get("validation_owed", False),
            elsewhere=None if lies_in(run_dir, directory) else directory,
            notes=[note for note in notes if note],
        )
    if init_from is not None:
        directory = store.checkpoint_at(init_from)
        recorded = read_state_with_config(directory)["config"]
        note = check_function(recorded, config, str(directory))
        load_initial_weights(engine, directory)
        return Beginning(elsewhere=directory, notes=[note] if note else [])
    return Beginning()


def _choice(run_dir: Path, resume: str | None, init_from: Path | None) -> tuple[str | None, Path | None, Path | None]:
    """How to resume, the checkpoint to go on from, and the weights of a run that begins."""
    directory = None if resume is None else Path(resume)
    if resume == "auto":
        directory = store.latest(run_dir / CHECKPOINTS) or started_from(run_dir)
    return resume, directory, initial_weights(run_dir, resume, init_from)


def _without_pointer(run_dir: Path, directory: Path) -> str:
    missing = run_dir / CHECKPOINTS / store.LATEST
    if missing.exists() or not lies_in(run_dir, directory):
        return ""
    return f"{missing} is missing; going on from {directory.name}, which was saved last"
