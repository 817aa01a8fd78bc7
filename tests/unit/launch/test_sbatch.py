"""The batch scripts, run by bash with a Slurm that is made of scripts."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "launcher" / "slurm"
OURS = ["train.sbatch", "srun.sbatch"]
SRUN = """#!/bin/bash
echo "$$" > "$STATE/srun.pid"
while [ "${1#-}" != "$1" ]; do echo "$1" >> "$STATE/srun.options"; shift; done
export SLURM_NODEID=1 SLURM_PROCID=1
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'gpu07\\ngpu08\\n'; else echo "$@" >> "$STATE/asked"; fi
"""
TRAIN = """#!/bin/bash
printf '%s\\n' "$@" > "$STATE/arguments"
if [ "$CODE" = wait ]; then
    trap 'sleep 0.2; exit 138' USR1
    touch "$STATE/started"
    while :; do sleep 0.05; done
fi
exit "$CODE"
"""


def start(folder: Path, script: str, code: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("moe-train", TRAIN)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "STATE": str(folder),
        "CODE": code,
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "48",
        **more,
    }
    return subprocess.Popen(
        ["bash", SCRIPTS / script, *arguments], env=environment, stdout=subprocess.PIPE, text=True, cwd=folder
    )


def arguments_of(folder: Path) -> list[str]:
    return (folder / "arguments").read_text().splitlines()


def srun_options(folder: Path) -> list[str]:
    return (folder / "srun.options").read_text().splitlines()


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sbatch")), ids=lambda path: path.name)
def test_they_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash" and any(line.startswith("#SBATCH --signal=B:USR1@") for line in lines)


@pytest.mark.parametrize("script", OURS)
@pytest.mark.parametrize("code", [0, 1, 2, 9, 129, 130, 131, 137, 138, 139, 143])
def test_a_job_is_queued_again_after_these_codes_only(tmp_path: Path, script: str, code: int) -> None:
    job = start(tmp_path, script, str(code), "demo")
    said, _ = job.communicate(timeout=60)
    assert job.returncode == code
    assert ("stopped and saved" in said) is (code in (138, 143))
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert asked == ("requeue 4711\n" if code in (131, 138, 143) else "")


@pytest.mark.parametrize("script", OURS)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_run_which_saves(tmp_path: Path, script: str, number: signal.Signals) -> None:
    job = start(tmp_path, script, "wait", "demo")
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.02)
    job.send_signal(number)
    assert job.wait(timeout=60) == 138
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"


def test_what_torchrun_is_started_with(tmp_path: Path) -> None:
    nasty = "name=a b;touch owned;$(touch owned)"
    assert start(tmp_path, "train.sbatch", "0", "demo", nasty).wait(timeout=60) == 0
    assert srun_options(tmp_path) == ["--cpus-per-task=48", "--kill-on-bad-exit=0"]
    words = arguments_of(tmp_path)
    assert words[:3] == ["train", "demo", nasty] and not (tmp_path / "owned").exists()
    assert words[3:] == shlex.split(
        "--launcher torchrun --no-ssh --num-nodes 2 --master-addr gpu07 --master-port 24711 --resume auto "
        "--max-restarts 10 --node-rank 1"
    )


def test_what_deepspeed_is_started_with(tmp_path: Path) -> None:
    job = start(tmp_path, "train.sbatch", "0", "demo", LAUNCHER="deepspeed", PROCESSES="4")
    assert job.wait(timeout=60) == 0
    words = arguments_of(tmp_path)
    assert "--max-restarts" not in words
    assert words[words.index("--processes") + 1] == "4" and words[words.index("--launcher") + 1] == "deepspeed"


def test_what_every_task_is_started_with(tmp_path: Path) -> None:
    assert start(tmp_path, "srun.sbatch", "0", "demo", "name=a b").wait(timeout=60) == 0
    assert arguments_of(tmp_path) == ["train", "demo", "name=a b", "--launcher", "srun", "--resume", "auto"]
    assert srun_options(tmp_path) == ["--cpus-per-task=48", "--kill-on-bad-exit=1", "--gpu-bind=none"]


@pytest.mark.parametrize("script", OURS)
def test_the_options_are_those_of_the_command(tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_train import cli

    assert start(tmp_path, script, "0", "demo").wait(timeout=60) == 0
    task = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2"}
    for name, value in (task | {"SLURM_JOB_NODELIST": "gpu[07-08]", "DS_ACCELERATOR": "cpu"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert cli.main([*arguments_of(tmp_path), "--dry-run"]) == 0
