"""The disk of the run's folder is away for a moment while a launch watches over its workers, or starts them again."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from moe_train.launch import restart
from moe_train.launch import run as launching
from moe_train.launch.ending import Ending
from moe_train.launch.plan import LaunchOptions
from moe_train.launch.remote import Say
from moe_train.training.heartbeat import read_beats
from moe_train.training.run_config import load_run_config
from moe_train.training.worker_status import StatusFile, forget, read_statuses


def stale(*_: Any) -> Any:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def test_who_watches_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    StatusFile(tmp_path, "x", 0).start()
    for module, name in ((os, "scandir"), (os, "unlink")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stale)
            if name == "scandir":
                assert read_statuses(tmp_path, "x") == read_beats(tmp_path, "x") == []
            forget(tmp_path, "x")
    assert [status.rank for status in read_statuses(tmp_path, "x")] == [0]


def test_a_restart_that_meets_it_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endings = [Ending(1, "killed", restart=True), Ending(0)]
    looks = [stale, lambda _: True]
    monkeypatch.setattr(launching, "supervise", lambda *_, **__: endings.pop(0))
    monkeypatch.setattr(launching, "holds_run", lambda folder: looks.pop(0)(folder))
    monkeypatch.setattr(launching, "check_data", lambda config: None)
    monkeypatch.setattr(restart, "_PAUSE_SECONDS", 0.0)
    config = load_run_config("tiny", ["train.global_batch_size=12", "train.micro_batch_size=1"])
    options = LaunchOptions("none", max_restarts=5)
    assert launching.launch_run(config, tmp_path, None, options, accelerators=0) == 0
    assert not endings and not looks


class Hosts:
    """Those of a hostfile, which answer at the first start and at the third."""

    def __init__(self) -> None:
        self.answers = [False, True]

    def check(self) -> None:
        pass

    def wait(self, seconds: float, say: Say) -> bool:
        return self.answers.pop(0)

    def silent(self) -> dict[str, str]:
        return {"worker-1": "no route to host"}

    def sweep(self, launches: list[str]) -> None:
        assert len(launches) == 1, "one start before"


def test_a_restart_without_its_hosts_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It could only fail, and say less about why."""
    endings = [Ending(1, "killed", restart=True), Ending(0)]
    hosts = Hosts()
    monkeypatch.setattr(launching, "launch_module", lambda *_, **__: endings.pop(0))
    monkeypatch.setattr(launching, "remote_hosts", lambda options: hosts)
    monkeypatch.setattr(launching, "check_pdsh", lambda: None)
    monkeypatch.setattr(launching, "check_data", lambda config: None)
    monkeypatch.setattr(restart, "_PAUSE_SECONDS", 0.0)
    config = load_run_config("tiny", ["train.global_batch_size=12", "train.micro_batch_size=1"])
    options = LaunchOptions("none", max_restarts=5)
    assert launching.launch_run(config, tmp_path, None, options, accelerators=0) == 0
    assert not endings and not hosts.answers
    assert "hosts have not answered for 1800 s: worker-1" in capsys.readouterr().err
