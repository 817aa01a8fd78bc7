"""Two runs in one folder."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.parallel.passing import may_pass
from moe_train.training.run_lock import InUseError, only_run

HOLD = """
import sys, time
from pathlib import Path
from moe_train.training.run_lock import only_run
with only_run(Path(sys.argv[1]), 0, goes_on=True):
    print("held", flush=True)
    time.sleep(600)
"""
TRY = """
import fcntl, sys
try:
    fcntl.lockf(open(sys.argv[1], "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(5)
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


def is_ours(run_dir: Path) -> bool:
    """Whether a process that comes now finds the lock of the folder held by this one."""
    code = subprocess.run([sys.executable, "-c", TRY, str(run_dir / ".lock")], check=False).returncode
    return code == 5 and f"process {os.getpid()} on " in (run_dir / ".lock").read_text()


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_second_run_is_refused(
    tmp_path: Path, other: subprocess.Popen[str], capsys: pytest.CaptureFixture[str], goes_on: bool
) -> None:
    """A start that goes on with the run may come again; a new one would go on with what the other has begun."""
    message = f"process {other.pid} on .* trains in this folder.*--run-dir.*remove {tmp_path / '.lock'}"
    with pytest.raises(InUseError, match=message) as raised:
        with only_run(tmp_path, 0.3, goes_on=goes_on):
            pytest.fail("two runs in one folder")
    assert may_pass(raised.value) is goes_on
    assert f"waiting for process {other.pid}" in capsys.readouterr().err


def test_the_lock_goes_with_its_process(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    """However that ends; one that is about to end is waited for."""
    other.send_signal(signal.SIGKILL)
    with only_run(tmp_path, 30.0, goes_on=True):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    with only_run(tmp_path, 0.0, goes_on=True):
        pass


def test_a_lock_whose_machine_is_gone_is_removed(
    tmp_path: Path, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the user, while a start waits for it: a new file is a new lock, for those who wait as well."""
    monkeypatch.setattr("time.sleep", lambda _: (tmp_path / ".lock").unlink())
    with only_run(tmp_path, 30.0, goes_on=True):
        monkeypatch.undo()
        assert is_ours(tmp_path)


def test_the_lock_of_a_removed_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file goes after it was opened, and before it is locked: whoever comes next would lock another one."""
    real, times = fcntl.lockf, iter([True])

    def lockf(descriptor: int, how: int) -> None:
        if next(times, False):
            (tmp_path / ".lock").unlink()
        real(descriptor, how)

    monkeypatch.setattr("fcntl.lockf", lockf)
    with only_run(tmp_path, 30.0, goes_on=True):
        assert is_ours(tmp_path)


def test_a_file_that_another_machine_has_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale handle is no sign of a disk without locks."""
    real, times = fcntl.lockf, iter([True])

    def lockf(descriptor: int, how: int) -> None:
        if next(times, False):
            raise OSError(errno.ESTALE, "Stale file handle")
        real(descriptor, how)

    monkeypatch.setattr("fcntl.lockf", lockf)
    with only_run(tmp_path, 30.0, goes_on=True):
        assert is_ours(tmp_path)


def test_where_there_can_be_no_lock_nobody_is_kept_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with only_run(tmp_path / "file" / "run", 0.0, goes_on=True):
        pass
