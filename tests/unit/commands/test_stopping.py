"""A preparation that is ended from outside, as Slurm and users end it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train.cli import main
from moe_train.commands.stopping import Terminated, can_be_stopped
from moe_train.data.prepare.pieces import PIECE_BYTES


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A preparation that takes its time, but for where it writes."""
    root = tmp_path_factory.mktemp("text")
    lines = (
        f"line {number}: router and expert {number % 97} share the load of token {number * 7}" for number in range(500)
    )
    (root / "small.txt").write_text("\n".join(lines))
    (root / "large").mkdir()
    (root / "large/0.txt").write_text("a piece that is soon done\n")
    # Larger than a piece is, so that it is work for seconds.
    block = "\n".join(f"{line}: a gate chooses {line % 101} experts" for line in range(40_000)) + "\n"
    (root / "large/1.txt").write_text(block * (1 + PIECE_BYTES // len(block)))
    model = f"{root}/m.model"
    assert main(["tokenizer", "train", f"{root}/small.txt", "--output", model, "--vocab-size", "300"]) == 0
    return ["prepare", f"{root}/large", "--tokenizer", model, "--text-format", "lines", "--workers", "2", "--output"]


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "whole_group", "code", "word"),
    [
        (signal.SIGTERM, False, 143, "terminated"),
        (signal.SIGTERM, True, 143, "terminated"),
        (signal.SIGINT, True, 130, "interrupted"),
    ],
)
def test_prepare_is_stopped(
    command: list[str], tmp_path: Path, number: int, whole_group: bool, code: int, word: str
) -> None:
    """One line, no worker is left, and the rest of the work is what is left to do."""
    line = [sys.executable, "-m", "moe_train", *command, f"{tmp_path}/d"]
    # Tests that run in the background of a shell ignore Ctrl-C, and so would what they begin.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "start_new_session": True}
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, **heard) as process:
        until(lambda: any(tmp_path.glob("**/0*.json")), process)  # a piece is done
        workers = children(process.pid)
        assert len(workers) >= 2
        (os.killpg if whole_group else os.kill)(process.pid, number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == code
    last = error.splitlines()[-1]
    assert last == f"moe-train: {word}; the same command again goes on where it was"
    assert "leaked" not in error and "Traceback" not in error
    until(lambda: not any(map(alive, workers)))


@pytest.mark.slow
def test_it_does_go_on(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [sys.executable, "-m", "moe_train", *command, f"{tmp_path}/d"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: any(tmp_path.glob("**/0*.json")), process)
        process.terminate()
        process.communicate(timeout=60)
    assert any(tmp_path.glob("**/0*.json")) and not list(tmp_path.glob("*_text_document.idx"))
    assert main([*command, f"{tmp_path}/d"]) == 0
    assert "0,001 documents" in capsys.readouterr().out


def test_signals_are_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match="^; advice$"), can_be_stopped("; advice"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(Terminated, match="^; advice$"), can_be_stopped("; advice"):
        sys.exit(int(signal.SIGTERM))  # as the handler does that Ray begins with
    with pytest.raises(SystemExit), can_be_stopped(""):
        sys.exit(1)
    with pytest.raises(ValueError, match="wrong"), can_be_stopped(""):
        raise ValueError("wrong")
    assert signal.getsignal(signal.SIGTERM) == before


def test_in_another_thread_it_leaves_signals_alone() -> None:
    seen = []

    def work() -> None:
        with can_be_stopped(""):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
