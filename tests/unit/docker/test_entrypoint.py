"""docker/entrypoint.sh with a moe-train that writes down how it was called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.reference.command_line import parse

ROOT = Path(__file__).resolve().parents[3]
ENTRY = ROOT / "docker" / "entrypoint.sh"
FAKE = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
case "$1" in doctor) exit "${FAKE_DOCTOR:-0}" ;; esac
env | grep -E '^(RANK|WORLD_SIZE)=' >> "$CALLS"
exit "${FAKE_CODE:-0}"
"""


class Entry:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir()
        for name in ("moe-train", "program"):
            (programs / name).write_text(FAKE)
            (programs / name).chmod(0o755)
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(folder / "home"),
            "CALLS": str(folder / "calls"),
        }

    def __call__(self, *arguments: str, **variables: str) -> list[str]:
        """The calls of programs; leaves code and error."""
        calls = self.folder / "calls"
        calls.write_text("")
        result = subprocess.run(
            ["sh", str(ENTRY), *arguments], env=self.environment | variables, capture_output=True, text=True, timeout=60
        )
        self.code, self.error = result.returncode, result.stderr
        return calls.read_text().splitlines()

    def train(self, *arguments: str, **variables: str) -> list[str]:
        """The arguments of the training, which its own parser takes; the machine was looked at before."""
        calls = self(*arguments, **variables)
        assert self.code == 0, self.error
        assert [call.split()[1] for call in calls] == ["doctor", "train"]
        line = calls[1].split()[2:]
        parse("train", line)
        return line


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    return Entry(tmp_path)


def test_without_arguments_it_looks_at_the_machine(entry: Entry) -> None:
    assert entry() == ["moe-train doctor"]


def test_other_commands_and_programs(entry: Entry) -> None:
    assert entry("prepare", "a b") == ["moe-train prepare a b"]
    assert entry("--", "program", "x") == ["program x"]
    entry("inspect", "x", FAKE_CODE="3")
    assert entry.code == 3


def test_one_node(entry: Entry) -> None:
    assert entry.train("train", "demo", "a=1") == ["demo", "a=1"]
    assert entry.train("deepspeed", "train", "demo") == ["demo", "--launcher", "deepspeed"]
    assert entry.train("torchrun", "train", "demo") == ["demo", "--launcher", "torchrun"]
    assert entry.train("train", "demo", MOE_TRAIN_PROCESSES="4", MOE_TRAIN_RUN_DIR="runs/x") == [
        *("demo", "--processes", "4", "--run-dir", "runs/x")
    ]


NODES = ["--no-ssh", "--num-nodes", "2", "--node-rank", "1", "--master-addr", "first"]


@pytest.mark.parametrize("way", ["deepspeed", "torchrun"])
def test_the_same_command_on_each_node(entry: Entry, way: str) -> None:
    variables = {"NUM_NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first"}
    assert entry.train(way, "train", "demo", **variables) == ["demo", "--launcher", way, *NODES]
    line = entry.train(way, "train", "demo", **variables, MASTER_PORT="1234")
    assert line == ["demo", "--launcher", way, *NODES, "--master-port", "1234"]


def test_variables_of_kubeflow(entry: Entry) -> None:
    """RANK is the number of the pod there; workers must not find it."""
    expected = ["demo", "--launcher", "torchrun", *NODES, "--master-port", "23456"]
    variables = {"MASTER_ADDR": "first", "MASTER_PORT": "23456", "RANK": "1", "WORLD_SIZE": "16"}
    assert entry.train("torchrun", "train", "demo", NUM_NODES="2", **variables) == expected
    pet = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "first", "PET_MASTER_PORT": "23456"}
    assert entry.train("torchrun", "train", "demo", **pet) == expected


def test_variables_of_slurm(entry: Entry) -> None:
    variables = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_NTASKS": "2", "MASTER_ADDR": "first"}
    assert entry.train("srun", "train", "demo", **variables) == ["demo", "--launcher", "torchrun", *NODES]
    # A step on fewer nodes than the job.
    step = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"}
    assert entry.train("srun", "train", "demo", **variables | step) == ["demo", "--launcher", "torchrun"]


@pytest.mark.parametrize(
    ("arguments", "variables", "error"),
    [
        (["torchrun", "evaluate"], {}, "starts trainings only"),
        (["torchrun"], {}, "starts trainings only"),
        (["torchrun", "train", "demo"], {"NUM_NODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK"),
        (["deepspeed", "train", "demo"], {"NUM_NODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR"),
        (["srun", "train", "demo"], {}, "SLURM_NODEID"),
        (
            ["srun", "train", "demo"],
            {"SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_NTASKS": "16", "MASTER_ADDR": "a"},
            "one task on each node",
        ),
        (["train", "demo"], {"FAKE_DOCTOR": "1"}, "cannot train"),
        (["sshd"], {"MOE_TRAIN_SSH_KEYS": "/nowhere"}, "/nowhere/authorized_keys"),
    ],
)
def test_refusals(entry: Entry, arguments: list[str], variables: dict[str, str], error: str) -> None:
    """With the code of wrong input, on which nothing starts again."""
    calls = entry(*arguments, **variables)
    assert entry.code == 2 and error in entry.error
    assert not any("train" in call.split()[1:] for call in calls)


def test_the_machine_need_not_be_looked_at(entry: Entry) -> None:
    assert entry("train", "demo", MOE_TRAIN_DOCTOR="0", FAKE_DOCTOR="1") == ["moe-train train demo"]


def test_codes_of_the_training_come_out(entry: Entry) -> None:
    for code in (0, 1, 2, 138, 143):
        entry("torchrun", "train", "demo", FAKE_CODE=str(code))
        assert entry.code == code


def test_it_is_replaced_by_what_it_starts(tmp_path: Path) -> None:
    """So that a signal to the entry point is one to the training."""
    result = subprocess.run(
        ["sh", "-c", f'echo $$; exec sh {ENTRY} -- sh -c "echo \\$\\$"'], capture_output=True, text=True, check=True
    )
    first, second = result.stdout.split()
    assert first == second


def test_live(entry: Entry) -> None:
    assert entry("live") == [] and entry.code == 0, "no run was named: nothing to complain about"
    assert entry("live", MOE_TRAIN_RUN_DIR="runs/x", FAKE_CODE="1") == ["moe-train live runs/x --max-age 60"]
    assert entry.code == 1
    assert entry("live", MOE_TRAIN_RUN_DIR="x", MOE_TRAIN_LIVE_SECONDS="5") == ["moe-train live x --max-age 5"]


def test_hosts_of_a_hostfile(entry: Entry, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "id").write_text("a key")
    variables = {"MOE_TRAIN_HOSTFILE": "hosts", "MOE_TRAIN_SSH_KEYS": str(keys), "NUM_NODES": "2"}
    assert entry.train("deepspeed", "train", "demo", **variables) == [
        *("demo", "--launcher", "deepspeed", "--hostfile", "hosts")
    ]
    ssh = tmp_path / "home" / ".ssh"
    assert (ssh / "id").read_text() == "a key" and (ssh / "id").stat().st_mode & 0o777 == 0o600
    assert "Port 2222" in (ssh / "config").read_text()
