"""Workers that are tasks of a Slurm step, which these tests stand for."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from moe_train.launch.plan import free_port
from tests.e2e.conftest import command, environment, moe_train, overrides

pytestmark = pytest.mark.slow


def step(folder: Path, data: Path, *more: str) -> list[subprocess.Popen[str]]:
    """Two tasks on this machine."""
    arguments = [*settings(data), *more, "--launcher", "srun", "--resume", "auto", "--run-dir", folder]
    arguments += ["--master-port", free_port()]
    tasks = []
    for rank in range(2):
        slurm = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2", "SLURM_JOB_ID": "4711"}
        variables = environment() | slurm | {"SLURM_STEP_NODELIST": "localhost"}
        line = command("train", "tiny", *arguments)
        tasks.append(subprocess.Popen(line, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    return tasks


def settings(data: Path) -> list[str]:
    sizes = ["train.global_batch_size=4", "train.micro_batch_size=1", "parallel.expert=2"]
    return overrides(data, *sizes, "train.steps=8", "logging.every=1", "eval.every=0", "checkpoint.every_steps=2")


def curve(run: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]


def test_a_step_trains_as_other_launchers_do(data: Path, tmp_path: Path) -> None:
    tasks = step(tmp_path / "srun", data)
    texts = [task.communicate(timeout=900)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], texts[0][-3000:]
    result = moe_train("train", "tiny", *settings(data), "--processes", 2, "--run-dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(curve(tmp_path / "run")) == 8 and curve(tmp_path / "srun") == curve(tmp_path / "run")


def test_a_signal_saves_and_rank_0_says_so(data: Path, tmp_path: Path) -> None:
    """And a job that is queued again goes on."""
    run = tmp_path / "run"
    tasks = step(run, data, "train.steps=100000")
    deadline = time.monotonic() + 900
    while not (run / "checkpoints" / "latest").exists():
        assert time.monotonic() < deadline and all(task.poll() is None for task in tasks)
        time.sleep(0.1)
    tasks[1].send_signal(signal.SIGUSR1)
    tasks[0].send_signal(signal.SIGUSR1)
    texts = [task.communicate(timeout=900)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [138, 0], texts[0][-3000:]
    last = int((run / "checkpoints" / "latest").read_text().removeprefix("step_"))
    assert curve(run)[-1][0] == last
    tasks = step(run, data, f"train.steps={last + 2}")
    texts = [task.communicate(timeout=900)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], texts[0][-3000:]
    assert [number for number, _ in curve(run)] == list(range(1, last + 3))
