"""A worker process: its arguments, its exit codes, and the file that says how it ended."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moe_train.checkpoint.saver import CheckpointError
from moe_train.training.run_config import load_run_config
from moe_train.training.run_folder import prepare
from moe_train.training.stop import StopRequest
from moe_train.training.worker import main
from moe_train.training.worker_status import StatusFile, read_statuses


@pytest.fixture(autouse=True)
def _signals_and_environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    prepare(tmp_path / "run", load_run_config("tiny"), None)
    return tmp_path / "run"


def test_it_hands_over_what_it_was_told(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["--run-dir", str(run_dir), "--resume", "auto", "--status", "x", "--local_rank=1"]
    assert main(arguments, lambda *given: not seen.append(given)) == 0
    ((config, folder, resume, stop),) = seen
    assert (config, folder, resume) == (load_run_config("tiny"), run_dir, "auto")
    assert not stop.requested
    (status,) = read_statuses(run_dir, "x")
    assert (status.rank, status.pid, status.exit_code) == (1, os.getpid(), 0)


@pytest.mark.parametrize("text", ["No space left", "\N{GRINNING FACE}" * 1000])
def test_a_full_disk_does_not_silence_it(run_dir: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A worker that seems to have died without a word would be started again, on a disk that is still full."""

    def train(*given: object) -> bool:
        def fails(*given: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", fails)
        raise CheckpointError(text)

    assert main(["--run-dir", str(run_dir), "--status", "x"], train) == 2
    (status,) = read_statuses(run_dir, "x")
    assert status.exit_code == 2 and status.error and text.startswith(status.error)
    assert not list((run_dir / "processes").glob("*.tmp"))


def test_without_a_launch_no_file_is_written(run_dir: Path) -> None:
    assert main(["--run-dir", str(run_dir)], lambda *_: True) == 0
    assert not (run_dir / "processes").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("bad\ninput"), 2),
        (OSError("disk"), 2),
        (OSError(errno.ENOSPC, "full"), 2),
        (CheckpointError("full"), 2),
        # What another start may not meet again.
        (OSError(errno.ESTALE, "stale"), 1),
        (OSError(errno.EIO, "input/output error"), 1),
        (CheckpointError("stale", passing=True), 1),
        (TimeoutError("late"), 1),
        (ConnectionResetError("gone"), 1),
        (RuntimeError("x"), 1),
        (FloatingPointError("nan"), 3),
    ],
)
def test_failures_have_a_code_and_a_reason(
    run_dir: Path, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def train(*_: Any) -> None:
        raise error

    assert main(["--run-dir", str(run_dir), "--status", "x"], train) == code
    assert f"rank 0: error: {f'{type(error).__name__}: ' if code == 1 else ''}{error}" in capsys.readouterr().err
    (status,) = read_statuses(run_dir, "x")
    assert status.exit_code == code and "\n" not in (status.error or "")


def test_a_later_start_of_a_launch_goes_on(run_dir: Path) -> None:
    """torchrun gives its workers the arguments of the first start, and where the nodes meet anew no count of starts."""
    seen: list[Any] = []

    def train(_config: Any, _folder: Any, resume: Any, _stop: Any) -> bool:
        (run_dir / "metrics.jsonl").touch()
        seen.append(resume)
        return True

    path = str(run_dir / "checkpoints" / "step_00000100")
    for launch, resume in (("x", "none"), ("x", "none"), ("y", path), ("y", path), ("z", "none")):
        assert main(["--run-dir", str(run_dir), "--status", launch, "--resume", resume], train) == 0
    assert seen == [None, "auto", path, "auto", None]


@pytest.mark.parametrize(("rank", "reads"), [(0, 1), (1, 0)])
def test_not_every_rank_looks_for_what_all_have_left(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, rank: int, reads: int
) -> None:
    """On a shared disk that would be the square of their number; and the first that has ended says enough."""
    for other in range(5):
        StatusFile(run_dir, "x", other).start()
        StatusFile(run_dir, "x", other).finish(1)
    real, seen = Path.read_text, []
    monkeypatch.setattr(Path, "read_text", lambda path, **options: seen.append(path) or real(path, **options))
    assert StatusFile(run_dir, "x", rank).is_later == (rank == 0)
    assert len(seen) == reads


def test_a_world_that_does_not_fit_is_refused(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["--run-dir", str(run_dir)], lambda *_: pytest.fail("started")) == 2


def test_by_hand_it_looks_at_the_folder(tmp_path: Path) -> None:
    run = tmp_path / "byhand"
    arguments = ["--config", "tiny", "--run-dir", str(run), "train.steps=3"]
    assert main(arguments, lambda config, *_: config.train.steps == 3 or pytest.fail("override lost")) == 0
    run.mkdir()
    (run / "metrics.jsonl").touch()
    assert main(arguments, lambda *_: pytest.fail("would overwrite a run")) == 2


@pytest.mark.parametrize("finished", [True, False])
def test_whether_it_was_stopped_is_in_its_file(run_dir: Path, finished: bool) -> None:
    assert main(["--run-dir", str(run_dir), "--status", "x"], lambda *_: finished) == 0
    (status,) = read_statuses(run_dir, "x")
    assert status.stopped != finished


def test_neither_folder_nor_configuration() -> None:
    assert main([], lambda *_: pytest.fail("started")) == 2


def test_a_signal_becomes_a_request(run_dir: Path) -> None:
    def train(_config: Any, _folder: Any, _resume: Any, stop: StopRequest) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and stop.signal == signal.SIGTERM
        return False

    assert main(["--run-dir", str(run_dir)], train) == 0


def test_a_second_ctrl_c_interrupts(run_dir: Path) -> None:
    def train(_config: Any, _folder: Any, _resume: Any, stop: StopRequest) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)

    assert main(["--run-dir", str(run_dir)], train) == 130


TRAINING = """
import time
from moe_train.training.stop import StopRequest
stop = StopRequest().install().obey_agent()
print("ready", flush=True)
while not stop.requested:
    time.sleep(0.05)
time.sleep(6)  # saving takes longer than the agent's patience
print("saved", flush=True)
"""


@pytest.mark.parametrize(
    ("numbers", "code", "said"),
    [
        ([signal.SIGTERM], 143, ""),
        ([signal.SIGUSR1], 0, "saved"),
        ([signal.SIGTERM, signal.SIGUSR1], 0, "saved"),
        ([signal.SIGUSR1, signal.SIGTERM], 0, "saved"),
    ],
)
def test_an_agent_that_ends_workers_is_not_a_request_to_save(
    numbers: list[signal.Signals], code: int, said: str
) -> None:
    """torchrun's agents send SIGTERM to those that are left when one has died; a stop that is asked for is SIGUSR1."""
    process = subprocess.Popen([sys.executable, "-c", TRAINING], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    begin = time.monotonic()
    for number in numbers:
        process.send_signal(number)
    assert process.stdout.read().strip() == said
    assert process.wait(timeout=60) == code
    assert time.monotonic() - begin < 25
    process.stdout.close()


def test_an_agent_ends_a_worker_whose_main_thread_waits() -> None:
    """Inside a library Python's own handlers do not run."""
    script = (
        "import ctypes\n"
        "from moe_train.training.stop import StopRequest\n"
        "StopRequest().install().obey_agent()\n"
        "mutex = ctypes.create_string_buffer(64)\n"
        "lock = ctypes.CDLL(None).pthread_mutex_lock\n"
        "lock(mutex)\n"
        "print('ready', flush=True)\n"
        "lock(mutex)\n"  # for ever, and no signal cuts it short
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    process.stdout.close()
