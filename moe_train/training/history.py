"""Who took which steps of a run, and with what: <run>/history.json, which travels on in checkpoints.

A run may be stopped and go on with another number of processes, another micro-batch or other later stages, go back to
an earlier checkpoint, or begin with the checkpoint of another run. What its present weights have read is then a chain
of stretches of steps. A checkpoint holds the chain that led to it, so that it outlasts the folders of earlier runs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.checkpoint.state import read_state
from moe_train.checkpoint.store import latest
from moe_train.data.files import write_atomically
from moe_train.training.run_folder import CHECKPOINTS, METRICS, started_from

HISTORY = "history.json"


@dataclass(frozen=True)
class Stretch:
    """Steps that one configuration took on one number of processes."""

    after: int
    """Optimizer steps that came before: its first one is the next."""
    run: str
    """Folder of the run that took them."""
    processes: int
    config: dict[str, Any]
    """The whole configuration, as run_config.to_dict has it."""
    samples: dict[str, Any]
    """TrainingSet.identity()."""


def continued(history: Sequence[Stretch], begun: Stretch) -> list[Stretch]:
    """The chain when `begun` goes on after `begun.after` steps of `history`. A start that changes nothing adds none."""
    kept = [stretch for stretch in history if stretch.after < begun.after]
    if kept and dataclasses.replace(kept[-1], after=begun.after) == begun:
        return kept
    return [*kept, begun]


def to_plain(history: Sequence[Stretch]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(stretch) for stretch in history]


def from_plain(entries: Sequence[dict[str, Any]]) -> list[Stretch]:
    return [Stretch(**entry) for entry in entries]


def write_history(run_dir: Path, history: Sequence[Stretch]) -> None:
    write_atomically(run_dir / HISTORY, (json.dumps({"stretches": to_plain(history)}, indent=1) + "\n").encode())


def read_history(run_dir: Path) -> list[Stretch]:
    """ValueError where the folder has no record, or a damaged one."""
    path = run_dir / HISTORY
    if not path.is_file():
        raise ValueError(
            f"{run_dir} does not say how its steps were taken: there is no {path}, which a run writes when it starts "
            "(runs of earlier versions did not). Going on with the run by --resume auto begins such a record"
        )
    try:
        return from_plain(json.loads(path.read_text(encoding="utf-8"))["stretches"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): copy it again, or go on with the run by --resume auto"
        ) from None


def stretch_of(run_dir: Path, step: int) -> Stretch:
    """Who took an optimizer step (from 1) that the weights of this run have behind them.

    Errors: ValueError where there is no such step, where it was not taken yet, or where it lies before the record.
    """
    history = read_history(run_dir)
    if step < 1:
        raise ValueError(f"steps are counted from 1, as in the metrics: there is no step {step}")
    taken, last = last_step(run_dir, history), history[-1]
    if step > taken:
        planned = last.config["train"]["steps"]
        so_far = f"{run_dir} has taken steps 1 to {taken}" if taken else f"{run_dir} has taken no step yet"
        more = (
            f"; it is to take {planned}: wait, or go on with it by --resume auto"
            if step <= planned
            else f"; train.steps is {planned}"
        )
        raise ValueError(f"{so_far}, not step {step}{more}")
    if step <= history[0].after:
        checkpoint = started_from(run_dir)
        where = f" ({checkpoint}, of another run)" if checkpoint is not None else ""
        raise ValueError(
            f"the record of {run_dir} begins after step {history[0].after}, where it went on from a checkpoint of a "
            f"version that kept none{where}: what step {step} read is not known here"
        )
    return next(stretch for stretch in reversed(history) if stretch.after < step)


def last_step(run_dir: Path, history: Sequence[Stretch]) -> int:
    """The last step that is known to be taken: by the metrics, or by a checkpoint where metrics are written rarely."""
    steps = [history[-1].after, _last_record(run_dir / METRICS)]
    try:
        newest = latest(run_dir / CHECKPOINTS)
        state = None if newest is None else read_state(newest)
    except ValueError:
        state = None  # removed by somebody; the metrics are still there
    if state is not None:
        # After going back, until the next save, the newest checkpoint is one of steps that no longer count.
        if from_plain(state.get("history", [])) == list(history):
            steps.append(state["step"])
    return max(steps)


def _last_record(path: Path) -> int:
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # cut short by a crash
    return 0
