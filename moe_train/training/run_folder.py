"""runs/<name>/: where a run keeps everything. Never overwritten silently."""

from __future__ import annotations

import json
import os
from pathlib import Path

from moe_train.training.run_config import RunConfig, load_run_config, to_yaml

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
_STARTED_FROM = "started_from"
_INITIAL_WEIGHTS = "initial_weights"


def default_run_dir(config: RunConfig) -> Path:
    return Path("runs") / config.name


def holds_run(run_dir: Path) -> bool:
    """Whether a run has got as far as its first step in this folder; a configuration alone loses nothing."""
    return any((run_dir / name).exists() for name in (METRICS, CHECKPOINTS))


def holds_evaluation(run_dir: Path, step: int) -> bool:
    """Whether the run has recorded its validation of this step."""
    path = run_dir / METRICS
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:  # cut short by a crash
            continue
        if isinstance(record, dict) and (record.get("kind"), record.get("step")) == ("eval", step):
            return True
    return False


def prepare(run_dir: Path, config: RunConfig, resume: str | None, init_from: Path | None = None) -> None:
    """Makes the folder and writes the resolved configuration; for when everything that can be refused was checked.

    ``resume``: None for a new run, "auto" to go on where the folder's run stopped (or to start it), or the path of a
    checkpoint; ``init_from``: where the weights of a new run come from. A run that is there already is refused unless
    it is the one to go on with; the configuration that it was started with is kept beside the new one where they
    differ.
    """
    check_free(run_dir, resume)
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / CONFIG
    text = to_yaml(config)
    if path.exists() and (before := path.read_text(encoding="utf-8")) != text:
        _write(_unused(run_dir), before)
    if resume is None:
        for name in (_STARTED_FROM, _INITIAL_WEIGHTS):
            (run_dir / name).unlink(missing_ok=True)  # of an attempt that took no step
    elif not _goes_on(run_dir, resume):
        _write(run_dir / _STARTED_FROM, str(Path(resume).resolve()))
    if init_from is not None:
        _write(run_dir / _INITIAL_WEIGHTS, str(init_from.resolve()))
    _write(path, text)


def check_free(run_dir: Path, resume: str | None) -> None:
    """The refusals of ``prepare``, which raises ValueError; changes nothing."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{run_dir} is a file; choose another folder with --run-dir")
    if resume is not None and resume != "auto" and not Path(resume).is_dir():
        raise ValueError(f"--resume {resume}: there is no such checkpoint folder; use --resume auto for the latest")
    if holds_run(run_dir) and not _goes_on(run_dir, resume):
        raise ValueError(
            f"{run_dir} holds a run already: go on with it by --resume auto, or choose another folder with --run-dir"
        )


def check_initial_weights(path: Path, resume: str | None) -> None:
    """ValueError where --init-from names nothing to begin with, or a resumed run has its weights already."""
    if resume not in (None, "auto"):
        raise ValueError(f"--resume {resume} goes on with weights of its own: leave out --init-from")
    if not any((path / name).is_file() for name in ("state.json", f"{CHECKPOINTS}/latest")):
        raise ValueError(
            f"--init-from {path}: there is no checkpoint; name a run's folder, an imported model or a checkpoint"
        )


def initial_weights(run_dir: Path, resume: str | None, init_from: Path | None) -> Path | None:
    """Where the weights of a run that has saved nothing come from: as asked now, or as it was started before."""
    path = run_dir / _INITIAL_WEIGHTS
    if init_from is None and resume == "auto" and path.is_file():
        return Path(path.read_text(encoding="utf-8"))
    return init_from


def started_from(run_dir: Path) -> Path | None:
    """The checkpoint of another run that this one began with; its own beginning as long as it has saved nothing."""
    path = run_dir / _STARTED_FROM
    return Path(path.read_text(encoding="utf-8")) if path.is_file() else None


def index_folder(config: RunConfig, run_dir: Path) -> Path:
    """Where each node keeps the index of samples; of use to later runs where ``data.index_cache`` names a folder."""
    return Path(config.data.index_cache).expanduser() if config.data.index_cache else run_dir / "index"


def load(run_dir: Path) -> RunConfig:
    """The configuration of the run in this folder."""
    path = run_dir / CONFIG
    if not path.is_file():
        raise ValueError(f"{run_dir} holds no run: there is no {path}")
    return load_run_config(path)


def lies_in(run_dir: Path, checkpoint: Path) -> bool:
    """Whether it is one of this run's own."""
    return checkpoint.resolve().is_relative_to(run_dir.resolve())


def _goes_on(run_dir: Path, resume: str | None) -> bool:
    return resume is not None and (resume == "auto" or lies_in(run_dir, Path(resume)))


def _unused(run_dir: Path) -> Path:
    number = 1
    while (path := run_dir / f"config.before_{number}.yaml").exists():
        number += 1
    return path


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
