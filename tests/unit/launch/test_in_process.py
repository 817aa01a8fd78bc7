"""Workers that this command becomes itself: alone, and as tasks of a Slurm step."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_train import cli
from moe_train.launch import run as launching
from moe_train.launch.ending import NOT_SAVED
from moe_train.launch.live import sign_of_life
from moe_train.launch.plan import LaunchOptions
from moe_train.training import worker
from moe_train.training.run_config import load_run_config
from moe_train.training.worker_status import FOLDER

SLURM = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_NTASKS": "12", "SLURM_LOCALID": "0"}


class Training:
    """Instead of the real one: looks at what the worker writes while it runs."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.fails = False
        self.interrupted = False

    def __call__(self, config: Any, run_dir: Path, resume: str | None, stop: Any) -> bool:
        assert "workers run on" in sign_of_life(run_dir, 60.0)
        self.files = sorted(path.name for path in (run_dir / FOLDER).iterdir())
        if self.fails:
            raise RuntimeError("broken")
        if self.interrupted:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return True


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Iterator[Training]:
    found = Training()
    monkeypatch.setattr(worker, "main", functools.partial(worker.main, train=found))
    monkeypatch.setattr(launching, "check_data", lambda config: None)
    monkeypatch.setattr(os, "environ", {**os.environ, "DS_ACCELERATOR": "cpu"})
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [(number, signal.getsignal(number)) for number in numbers]
    yield found
    for number, handler in before:
        signal.signal(number, handler)


def launch(run: Path, options: LaunchOptions, **variables: str) -> int:
    config = load_run_config("tiny", ["train.global_batch_size=12", "train.micro_batch_size=1"])
    return launching.launch_run(
        config, run, None, options, accelerators=0, base_environment={**os.environ, **variables}
    )


@pytest.mark.parametrize("fails", [False, True])
def test_a_worker_alone_gives_signs_of_life(training: Training, tmp_path: Path, fails: bool) -> None:
    training.fails = fails
    assert launch(tmp_path, LaunchOptions("none")) == (worker.FAILED if fails else 0)
    assert [name.partition(".")[2] for name in training.files] == ["rank_0.beat", "rank_0.json"]
    assert not (tmp_path / FOLDER).exists()


def test_a_task_gives_signs_of_life_and_leaves_those_of_others(training: Training, tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    others = [tmp_path / FOLDER / f"slurm-4711-2-0.rank_{rank}.json" for rank in (0, 10)]
    for path in others:
        path.touch()
    task = {**SLURM, "SLURM_PROCID": "1", "RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "12"}
    assert launch(tmp_path, LaunchOptions("srun", tasks=12), **task) == 0
    assert {"slurm-4711-2-0.rank_1.beat", "slurm-4711-2-0.rank_1.json"} <= set(training.files)
    assert sorted((tmp_path / FOLDER).iterdir()) == sorted(others)


@pytest.mark.parametrize("rank", [None, "1"])
def test_a_second_ctrl_c_saves_nothing(training: Training, tmp_path: Path, rank: str | None) -> None:
    """The code must not say that all is saved."""
    training.interrupted = True
    task = {} if rank is None else {**SLURM, "SLURM_PROCID": rank, "RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "12"}
    options = LaunchOptions("none") if rank is None else LaunchOptions("srun", tasks=12)
    assert launch(tmp_path, options, **task) == NOT_SAVED


def test_an_agent_further_up_is_not_obeyed(training: Training, tmp_path: Path) -> None:
    """A worker that torchrun's agent watches ends at SIGTERM without saving."""
    assert launch(tmp_path, LaunchOptions("none"), TORCHELASTIC_RUN_ID="4") == 0
    assert "TORCHELASTIC_RUN_ID" not in os.environ


def test_a_time_that_nobody_would_watch_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "tiny", "--launcher", "srun", "--hang-timeout", "60"]) == 2
    assert "nobody watches over the tasks" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "alone"), [([], True), (["--hang-timeout=0"], True), (["--hang-timeout=60"], False)])
def test_a_time_that_is_given_needs_somebody_who_watches(
    monkeypatch: pytest.MonkeyPatch, more: list[str], alone: bool
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(launching, "launch_run", lambda *_, **options: seen.update(options) or 0)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert cli.main(["train", "tiny", "--launcher", "none", *more]) == 0
    assert seen["in_process"] == alone
    assert seen["limits"].hang == (1800.0 if not more else float(more[0].partition("=")[2]))
