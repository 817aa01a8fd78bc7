"""Whether a run may go on from a checkpoint with its own samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_train.data.identity import differences
from moe_train.data.training_set import read_before


def check_samples(directory: Path, state: dict[str, Any], now: dict[str, Any], batch_size: int, *, strict: bool) -> str:
    """A note where the samples that a checkpoint (`state`) has read are not those of a run; else nothing.

    now: TrainingSet.identity().   batch_size: samples of an optimizer step.
    Errors: ValueError with another batch size, and where the samples differ if `strict`.
    """
    consumed = state["step"] * batch_size
    if state["consumed_samples"] != consumed:
        raise ValueError(
            f"{directory} has consumed {state['consumed_samples']} samples in {state['step']} steps, which is not "
            f"train.global_batch_size = {batch_size} per step; use the run's own value"
        )
    changed = "; ".join(differences(read_before(state["samples"], consumed), read_before(now, consumed)))
    if changed and strict:
        raise ValueError(
            f"{directory} was trained on other samples ({changed}): some would be read twice and others "
            "never; use the run's own values, or begin a new run with --resume PATH --run-dir NEW"
        )
    return f"note: other samples than before ({changed}), from position {consumed}" if changed else ""
