"""moe-train inspect --verify."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.checkpoint.index import read_index
from moe_train.checkpoint.streaming import write_weights
from moe_train.checkpoint.verify import damages
from moe_train.checkpoint.writing import LazyBox
from moe_train.cli import main


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (1, 2):
        values = torch.randn(4)
        box = LazyBox("model.a", (4,), (0,), (4,), torch.float32, lambda values=values: values)  # type: ignore[misc]
        write_weights(tmp_path / "run" / "checkpoints", step, [box], {})
    return tmp_path / "run"


def test_all_checkpoints_of_a_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run_dir), "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("1 files" in line and "as they were written" in line for line in lines)
    victim = run_dir / "checkpoints" / "step_00000001"
    file = next(victim.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["inspect", str(run_dir), "--verify"]) == 1
    told = capsys.readouterr().out
    assert f"{victim}: DAMAGED\n  {file.name} has" in told and "step_00000002: 1 files" in told
    assert main(["inspect", str(run_dir / "checkpoints" / "step_00000002"), "--verify"]) == 0


@pytest.mark.parametrize("pointer", ["latest", "best"])
def test_a_pointer_that_names_none(run_dir: Path, capsys: pytest.CaptureFixture[str], pointer: str) -> None:
    (run_dir / "checkpoints" / pointer).write_text("step_00000007\n")
    assert main(["inspect", str(run_dir), "--verify"]) == 1
    assert "DAMAGED" in (told := capsys.readouterr().out) and f"{pointer} names step_00000007" in told


@pytest.mark.parametrize("before", ["moe_train.checkpoint.verify.damages", "moe_train.checkpoint.index.read_index"])
def test_a_checkpoint_that_its_run_removes_meanwhile(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """Before its files are read, or when all are."""
    read = {"damages": damages, "read_index": read_index}[before.rpartition(".")[2]]

    def removed(directory: Path) -> Any:
        if directory.name.endswith("1"):
            shutil.rmtree(directory)
        return read(directory)

    monkeypatch.setattr(before, removed)
    assert main(["inspect", str(run_dir), "--verify"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and "step_00000001: removed meanwhile" in told[0] and "as they were written" in told[1]


def test_what_has_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path), "--verify"]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "train"), "--verify"]) == 2
    assert "--verify is for the folder of a run" in capsys.readouterr().err
