"""The real launchers with workers that load no torch: what they do to their workers, and what we make of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train.launch.environment import worker_environment
from moe_train.launch.plan import LaunchOptions, command, free_port
from moe_train.launch.run import worker_arguments
from moe_train.launch.supervise import Limits, supervise

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


def environment(behaviour: str) -> dict[str, str]:
    path = os.pathsep.join([str(HERE), str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "FAKE_WORKER": behaviour}


def run(folder: Path, options: LaunchOptions, behaviour: str, meanwhile: Callable[[], None] | None = None) -> int:
    variables = worker_environment(options, environment(behaviour), cpu=True)
    name = uuid.uuid4().hex[:12]
    arguments = worker_arguments(folder, "auto", folder / "config.yaml", name)
    line = command(options, arguments, scratch=folder, environment=variables, module="fake_worker")

    def when_started() -> None:
        deadline = time.monotonic() + 120
        while len(list(folder.glob("started_*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert meanwhile is not None
        meanwhile()

    helper = threading.Thread(target=when_started)
    if meanwhile:
        helper.start()
    ending = supervise(
        line, run_dir=folder, launch=name, environment=variables, local_processes=2, limits=Limits(death=20.0)
    )
    if meanwhile:
        helper.join()
    return ending.code


DEEPSPEED, TORCHRUN = LaunchOptions("deepspeed", 2), LaunchOptions("torchrun", 2)
LAUNCHERS = [DEEPSPEED, TORCHRUN]


def test_finish(tmp_path: Path) -> None:
    assert run(tmp_path, DEEPSPEED, "finish") == 0
    assert sorted(path.name for path in tmp_path.glob("started_*")) == ["started_0", "started_1"]
    assert all("world 2" in path.read_text() for path in tmp_path.glob("started_*"))


@pytest.mark.parametrize("options", LAUNCHERS, ids=lambda options: options.launcher)
def test_the_workers_save_when_stopped(tmp_path: Path, options: LaunchOptions) -> None:
    assert run(tmp_path, options, "wait", lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert len(list(tmp_path.glob("saved_*"))) == 2


@pytest.mark.parametrize(
    ("options", "behaviour", "code"), [(DEEPSPEED, "fails", 7), (DEEPSPEED, "killed", None), (TORCHRUN, "fails", 7)]
)
def test_a_rank_that_ends_badly(tmp_path: Path, options: LaunchOptions, behaviour: str, code: int | None) -> None:
    start = time.monotonic()
    found = run(tmp_path, options, behaviour)
    assert found == code if code else found != 0
    assert time.monotonic() - start < 120


def test_two_nodes_by_two_commands(tmp_path: Path) -> None:
    port = free_port()
    nodes = []
    for rank in range(2):
        options = LaunchOptions(
            processes=1, no_ssh=True, nodes=2, node_rank=rank, master_addr="127.0.0.1", master_port=port
        )
        variables = worker_environment(options, environment("finish"), cpu=True)
        arguments = worker_arguments(tmp_path, None, None, f"node{rank}")
        line = command(options, arguments, scratch=tmp_path, module="fake_worker")
        nodes.append(subprocess.Popen(line, env=variables))
    assert [node.wait(timeout=120) for node in nodes] == [0, 0]
    assert all("world 2" in path.read_text() for path in tmp_path.glob("started_*"))
    assert len(list(tmp_path.glob("started_*"))) == 2


def test_the_interpreter_is_ours(tmp_path: Path) -> None:
    """No launcher is looked up on PATH, where another environment's may stand."""
    for options in LAUNCHERS:
        assert command(options, [], scratch=tmp_path)[0] == sys.executable
