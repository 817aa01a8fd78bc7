"""A rank that is frozen: the others wait for it in a collective, and all go on from the latest checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.e2e.checkpoints import latest, records, tensors
from tests.e2e.conftest import command, environment, moe_train, overrides

pytestmark = pytest.mark.slow


def arguments(data: Path, run: Path, *more: str) -> list[str]:
    sizes = ["train.steps=150", "train.global_batch_size=4", "train.micro_batch_size=1", "parallel.expert=2"]
    saves = ["checkpoint.every_steps=5", "eval.every=0", "logging.every=1"]
    return ["train", "tiny", *overrides(data, *sizes, *saves), "--processes", "2", "--run-dir", str(run), *more]


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    run = tmp_path_factory.mktemp("alone") / "run"
    result = moe_train(*arguments(data, run))
    assert result.returncode == 0, result.stderr[-3000:]
    return run


def beats(run: Path) -> list[dict[str, Any]]:
    found = []
    for path in (run / "processes").glob("*.beat"):
        try:
            found.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue  # being replaced
    return sorted(found, key=lambda beat: int(beat["rank"]))


def trains(run: Path) -> bool:
    return (run / "checkpoints" / "latest").exists() and [beat["phase"] for beat in beats(run)] == ["train", "train"]


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_frozen_rank(data: Path, alone: Path, tmp_path: Path, launcher: str) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    line = command(*arguments(data, run, "--launcher", launcher, "--max-restarts", "3", "--hang-timeout", "20"))
    with log.open("w") as file:
        process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, env=environment())
    try:
        deadline = time.monotonic() + 300
        while not trains(run):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.02)
        frozen = beats(run)[1]["pid"]
        os.kill(frozen, signal.SIGSTOP)
        assert process.wait(timeout=600) == 0, log.read_text()[-3000:]
    finally:
        for child in psutil.Process().children(recursive=True):
            child.kill()
    text = log.read_text()
    assert text.count("no rank has made progress for 20 s; killing all. What they were doing:") == 1, text[-3000:]
    assert "no sign of life for" in text and not psutil.pid_exists(frozen)
    steps = [record["step"] for record in records(run) if record["kind"] == "train"]
    assert steps == list(range(1, 151))
    wanted, found = tensors(latest(alone)), tensors(latest(run))
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
