"""What is done on other hosts, through an ssh that is a script of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from moe_train.launch import examination, remote
from moe_train.launch.conversation import HostError
from moe_train.launch.remote import RemoteHosts, run_on, ssh

# Like ssh: options, a host, then words that the host's shell reads as one line.
SSH = """#!/bin/sh
while [ "$1" = -o ]; do shift 2; done
host=$1; shift
echo "$host" >> "$STATE/asked"
echo "$*" >> "$STATE/lines"
if [ "$host" = down ] && [ ! -e "$STATE/up" ]; then echo "ssh: connect to host down: No route to host" >&2; exit 255; fi
if [ "$host" = slow ]; then exec sleep 30; fi
exec sh -c "$*"
"""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STATE", str(tmp_path))
    return tmp_path


def test_words_arrive_as_words(state: Path) -> None:
    words = ["a b", "$(touch owned)", ";touch owned", "'", '"', "*", "`id`", ""]
    result = run_on("a", [sys.executable, "-c", "import sys; print(sys.argv[1:])", *words])
    assert result is not None and result.stdout.strip() == str(words)
    assert not (state / "owned").exists() and ssh("a", ["x"])[-2:] == ["a", "x"]


def test_hosts_that_do_not_answer_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    RemoteHosts(("a", "b")).check()
    with pytest.raises(ValueError) as error:
        RemoteHosts(("a", "down", "b")).check()
    text = str(error.value)
    assert "  down: ssh: connect to host down: No route to host" in text and "  a:" not in text
    monkeypatch.setattr(remote, "_SECONDS", 0.2)
    assert run_on("slow", ["true"], 0.2) is None


def test_waiting_for_a_host(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PAUSE", 0.05)
    said: list[str] = []
    assert not RemoteHosts(("a", "down")).wait(0.3, said.append)
    assert len(said) == 1 and "down (ssh: connect to host down" in said[0]

    def repair(text: str) -> None:
        said.append(text)
        (state / "up").touch()

    assert RemoteHosts(("a", "down")).wait(60.0, repair) and len(said) == 2


@pytest.fixture
def launch() -> Iterator[tuple[str, dict[str, subprocess.Popen[str]]]]:
    """A launch with processes whose command lines are those of a worker, of its launcher and of another launch."""
    name, other = uuid.uuid4().hex[:12], uuid.uuid4().hex[:12]
    script = (
        'import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\nprint("ready", flush=True)\n'
    )
    lines = {
        "worker": ["-m", "moe_train.training", "--local_rank=0", "--status", name],
        "launcher": ["--module", "moe_train.training", "--status", name],
        "other": ["-m", "moe_train.training", "--status", other],
    }
    processes = {
        key: subprocess.Popen(
            [sys.executable, "-c", script + "time.sleep(300)", *words], stdout=subprocess.PIPE, text=True
        )
        for key, words in lines.items()
    }
    for process in processes.values():
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield name, processes
    for process in processes.values():
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def ended(process: subprocess.Popen[str], seconds: float = 30.0) -> int | None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return process.returncode


def test_only_workers_are_asked_to_stop(launch: tuple[str, dict[str, subprocess.Popen[str]]]) -> None:
    name, processes = launch
    hosts = RemoteHosts(("a", "down"))
    assert hosts.run(name, "moe_train.training") and not hosts.run(name, "moe_train.other")
    hosts.tell(name, "moe_train.training")
    assert ended(processes["worker"]) == 5
    assert not hosts.run(name, "moe_train.training"), "its launcher is none"
    time.sleep(0.3)
    assert processes["launcher"].poll() is None and processes["other"].poll() is None


def test_nothing_of_a_launch_stays(launch: tuple[str, dict[str, subprocess.Popen[str]]], state: Path) -> None:
    name, processes = launch
    RemoteHosts(("down", "a")).sweep([name, uuid.uuid4().hex[:12]])
    assert ended(processes["worker"]) == ended(processes["launcher"]) == -9
    time.sleep(0.3)
    assert processes["other"].poll() is None
    (state / "asked").unlink()
    RemoteHosts(("a",)).sweep([])
    assert not (state / "asked").exists()


def test_without_pdsh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="install the system package pdsh"):
        remote.check_pdsh()


def test_variables_stand_on_no_command_line(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"NCCL_NOTE": "s3cret 'x' ä", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    monkeypatch.chdir(Path(__file__).parents[3])
    with examination._talk("a", variables) as host:
        assert host.ask("clock") > 0
        process = psutil.Process(host._process.pid)
        assert process.environ().items() >= variables.items()
        assert process.cmdline()[1:] == ["-u", "-m", "moe_train.launch.facts"]
        assert host.clock()[1] < 60
    assert "s3cret" not in (state / "lines").read_text()


def test_a_host_that_is_down_says_why() -> None:
    with examination._talk("down", {"A": "x" * 100_000}) as host, pytest.raises(HostError, match="No route to host"):
        host.ask("clock")
