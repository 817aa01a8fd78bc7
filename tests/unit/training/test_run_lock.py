"""Two runs in one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.training.run_lock import only_run

HOLD = """
import sys, time
from pathlib import Path
from moe_train.training.run_lock import only_run
with only_run(Path(sys.argv[1]), 0):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path):
    """A process that has the folder."""
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused(
    tmp_path: Path, other: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=f"process {other.pid} on .* trains in this folder.*--run-dir"):
        with only_run(tmp_path, 0.3):
            pytest.fail("two runs in one folder")
    assert f"waiting for process {other.pid}" in capsys.readouterr().err


def test_the_lock_goes_with_its_process(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    """However that ends; one that is about to end is waited for."""
    other.send_signal(signal.SIGKILL)
    with only_run(tmp_path, 30.0):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    with only_run(tmp_path, 0.0):
        pass


def test_where_there_can_be_no_lock_nobody_is_kept_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with only_run(tmp_path / "file" / "run", 0.0):
        pass
