"""Which checkpoint an evaluation takes: its result is one of the run, with the run's configuration."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from moe_train.training import evaluate, run_folder
from moe_train.training.loading import own_checkpoint
from moe_train.training.run_config import RunConfig


def run_with(folder: Path, step: int = 5) -> Path:
    (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    (folder / "config.yaml").write_text("name: x\n")
    return folder


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be evaluated with this run's configuration, and replace this run's result."""
    mine, other = run_with(tmp_path / "mine"), run_with(tmp_path / "other")
    monkeypatch.setattr(run_folder, "load", lambda _: RunConfig())
    arguments = argparse.Namespace(run_dir=mine, checkpoint=str(other / "checkpoints" / "step_00000005"))
    with pytest.raises(ValueError, match=f"evaluate that run instead, moe-train evaluate {other.resolve()} "):
        evaluate.evaluate_run(arguments)


def test_a_path_into_the_run_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is written; a copy that lies in no run is taken for what it is said to be."""
    run = run_with(tmp_path / "runs" / "mine")
    there = run / "checkpoints" / "step_00000005"
    (tmp_path / "link").symlink_to(run)
    (copy := tmp_path / "kept" / "step_00000005").mkdir(parents=True)
    (backup := run / "backup" / "runs" / "checkpoints" / "step_00000005").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in (str(there), "runs/mine/checkpoints/step_00000005", "link/checkpoints/step_00000005", "5"):
        assert own_checkpoint(run, name).resolve() == there.resolve()
    assert own_checkpoint(tmp_path / "link", str(there)) == there
    assert own_checkpoint(run, str(copy)) == copy and own_checkpoint(run, str(backup)) == backup
    with pytest.raises(ValueError, match="there is no checkpoint"):
        own_checkpoint(run, str(tmp_path / "nothing"))
