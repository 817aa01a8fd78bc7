"""A second launch in the folder of a run that trains, before its workers are refused there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_train.launch import run as launching
from moe_train.launch.ending import Ending
from moe_train.launch.hosts import read_hostfile
from moe_train.launch.plan import LaunchOptions
from moe_train.training.run_config import load_run_config
from moe_train.training.worker import parse

Lines = list[list[str]]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Lines:
    """The command lines of launches, whose launchers are not started."""
    found: Lines = []

    def supervise(line: list[str], **_: Any) -> Ending:
        found.append(line)
        if "--hostfile" in line and (hostfile := line[line.index("--hostfile") + 1]):
            assert read_hostfile(Path(hostfile)) == {"node-0": 1, "node-1": 1}
        return Ending(0)

    monkeypatch.setattr(launching, "supervise", supervise)
    monkeypatch.setattr(launching, "check_data", lambda config: None)
    return found


def launch(run: Path, *overrides: str, **options: Any) -> None:
    config = load_run_config("tiny", ["train.global_batch_size=12", "train.micro_batch_size=1", *overrides])
    chosen = LaunchOptions(processes=1, **options)
    assert launching.launch_run(config, run, "auto", chosen, accelerators=0, in_process=False) == 0


def rate(line: list[str]) -> float:
    """What a worker that is started with these arguments now would train with."""
    worker = parse(line[line.index("--run-dir") :])
    return load_run_config(worker.config, []).optimizer.lr


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "none"])
def test_it_does_not_change_what_the_run_starts_again_with(lines: Lines, tmp_path: Path, launcher: str) -> None:
    launch(tmp_path, "optimizer.lr=0.001", launcher=launcher)
    launch(tmp_path, "optimizer.lr=0.5", launcher=launcher)
    assert [rate(line) for line in lines] == [0.001, 0.5]


def test_the_folder_does_not_grow_by_launches(lines: Lines, tmp_path: Path) -> None:
    for node_rank in (0, 0, 1):
        launch(tmp_path, launcher="deepspeed", nodes=2, node_rank=node_rank, no_ssh=True, master_addr="a")
    assert len(lines) == 3
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_a_generated_hostfile_is_the_launch_s_own(lines: Lines, tmp_path: Path) -> None:
    for _ in range(2):
        launch(tmp_path, launcher="deepspeed", nodes=2, no_ssh=True, master_addr="a")
    first, second = (Path(line[line.index("--hostfile") + 1]) for line in lines)
    assert first != second and tmp_path not in first.parents and not first.exists()
