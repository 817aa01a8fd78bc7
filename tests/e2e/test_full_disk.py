"""A run whose disk, a small one of its own, is full for a while."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.checkpoints import latest, records
from tests.e2e.conftest import command, environment, overrides

pytestmark = pytest.mark.slow

SIZE = 8 << 20
STEPS = 300


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"NOT TESTED, a disk of its own needs root: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def wait_for(found: Path, process: subprocess.Popen[str], text: str = "") -> None:
    deadline = time.monotonic() + 300
    while not (found.exists() and text in found.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, f"no {text or found.name}"
        time.sleep(0.02)


def fill(ballast: Path) -> None:
    with open(ballast, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_full_disk(data: Path, tmp_path: Path, disk: Path, on_error: str) -> None:
    """The run ends, and is not started again; or it goes on, and lacks only the saves of that time."""
    run, log = disk / "run", tmp_path / "log"
    sizes = [f"train.steps={STEPS}", "train.global_batch_size=2", "train.micro_batch_size=1", "eval.every=0"]
    options = ["logging.every=1", "checkpoint.every_steps=20", "checkpoint.keep=1", f"checkpoint.on_error={on_error}"]
    line = command(
        *("train", "tiny", *overrides(data, *sizes, *options), "--launcher", "none", "--max-restarts", 3),
        *("--run-dir", run),
    )
    with open(log, "w") as output:
        process = subprocess.Popen(line, env=environment(), text=True, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for(run / "checkpoints" / "latest", process)
        fill(disk / "ballast")
        if on_error == "continue":
            wait_for(log, process, "could not be saved")
            os.unlink(disk / "ballast")
        code = process.wait(timeout=300)
    finally:
        process.kill()
        process.wait()
    text = log.read_text()
    assert "No space left" in text
    if on_error == "stop":
        assert code == 2 and "restart 1" not in text, text[-3000:]
        assert latest(run).is_dir()
        return
    assert code == 0, text[-3000:]
    found = records(run)
    assert [record["step"] for record in found if record["kind"] == "train"] == list(range(1, STEPS + 1))
    assert any(record["kind"] == "checkpoint" and "error" in record for record in found)
    assert latest(run).name == f"step_{STEPS:08d}"
    assert "metrics.jsonl can be written again" in text
