"""A model of a run as it is used after training: plain weights, no engine."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_train.model.language_model import LanguageModel
    from moe_train.parallel.groups import Groups
    from moe_train.training.run_config import RunConfig

STATE = "state.json"
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class LoadedWeights:
    model: LanguageModel
    """In evaluation mode, on the device of the groups."""
    state: dict[str, Any]
    """Non-tensor state of the checkpoint; ``step`` is its optimizer step."""


def load_model(config: RunConfig, groups: Groups, directory: Path, precision: str | None = None) -> LoadedWeights:
    """The model of a checkpoint under the layout of ``groups``; collective.

    precision: float32 or bfloat16; None for that of the training. Gate state stays float32. Errors: ValueError where
    the checkpoint is of another model or cannot be read.
    """
    from moe_train.model.language_model import build_language_model
    from moe_train.training.state import load_weights

    precision = precision or config.train.precision
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; known are {', '.join(PRECISIONS)}")
    model = build_language_model(
        config.model, config.router, sequence_length=config.data.sequence_length, seed=config.seed
    )
    state = load_weights(model, groups, directory)
    model.to(groups.device)
    if precision == "bfloat16":
        model.bfloat16()
    return LoadedWeights(model.eval(), state)


def with_layout_for(config: RunConfig, world_size: int) -> RunConfig:
    """Weights load under any layout: with fewer processes than the training had, more experts lie on each. Tensors are
    whole, so that every process can read other samples, of any length."""
    expert = math.gcd(config.parallel.expert, world_size)
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, expert=expert, tensor=1))


def run_and_checkpoint(path: Path, step: int | None = None) -> tuple[Path, Path]:
    """The run folder and the checkpoint that a path means: a run folder (its latest checkpoint, or that of ``step``),
    or a checkpoint inside of one. Errors: FileNotFoundError; ValueError where it is neither."""
    from moe_train.training.run_folder import CONFIG

    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; give a run folder or a checkpoint inside of one")
    if (path / STATE).is_file():
        run_dir = path.resolve().parent.parent
        if not (run_dir / CONFIG).is_file():
            raise ValueError(f"{path} is a checkpoint outside of a run folder: there is no {run_dir / CONFIG}")
        if step is not None:
            raise ValueError(f"{path} is one checkpoint already; give the run folder to choose step {step} of it")
        return run_dir, path
    if (path / CONFIG).is_file():
        return path, find_checkpoint(path, "latest" if step is None else str(step))
    raise ValueError(f"{path} is neither a run folder (with {CONFIG}) nor a checkpoint (with {STATE})")


def own_checkpoint(run_dir: Path, name: str) -> Path:
    """As ``find_checkpoint``; ValueError where the path leads into another run, whose configuration is another one. A
    copy outside of any run is taken as one of this run."""
    from moe_train.training.run_folder import CONFIG

    directory = find_checkpoint(run_dir, name)
    other = directory.resolve().parent.parent
    if (other / CONFIG).is_file() and not directory.resolve().is_relative_to(run_dir.resolve()):
        raise ValueError(
            f"{directory} is a checkpoint of the run {other}, not of {run_dir}: evaluate that run instead, moe-train "
            f"evaluate {other} --checkpoint {directory}; --against compares the routing of two runs"
        )
    return directory


def find_checkpoint(run_dir: Path, name: str) -> Path:
    """``latest``, a step, or the path of a checkpoint. ValueError when there is none."""
    from moe_train.checkpoint.store import latest
    from moe_train.training.run_folder import CHECKPOINTS

    root = run_dir / CHECKPOINTS
    if name == "latest":
        directory = latest(root)
        if directory is None:
            raise ValueError(f"{run_dir} has no checkpoint yet")
        return directory
    directory = root / f"step_{int(name):08d}" if name.isdigit() else Path(name)
    if not directory.is_dir():
        there = ", ".join(sorted(path.name for path in root.glob("step_????????"))) or "none"
        raise ValueError(f"there is no checkpoint {directory}; {run_dir} has: {there}")
    return directory
