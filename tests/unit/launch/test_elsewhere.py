"""How a launch ends whose workers are on other machines, where only what they write tells of them."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from pathlib import Path

import pytest

from moe_train.launch.ending import Ending
from moe_train.launch.supervise import Limits, supervise
from moe_train.training.worker_status import FOLDER, WorkerStatus


def write_status(run: Path, code: int | None) -> None:
    (run / FOLDER).mkdir(exist_ok=True)
    status = WorkerStatus(0, 11, "far", 1.0, exit_code=code)
    (run / FOLDER / "abc.rank_0.json").write_text(json.dumps(dataclasses.asdict(status)))


def launch(run: Path, last_words: float) -> Ending:
    """Its launcher says at once that all went well."""
    return supervise(
        [sys.executable, "-c", ""],
        run_dir=run,
        launch="abc",
        environment=os.environ,
        local_processes=None,
        limits=Limits(last_words=last_words),
    )


def test_a_pdsh_that_was_killed_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_status(tmp_path, None)
    ending = launch(tmp_path, 0.1)
    assert (ending.code, ending.restart) == (1, True)
    assert "rank 0 has not reported its end" in capsys.readouterr().err
    assert not (tmp_path / FOLDER).exists()


def test_a_network_disk_may_show_the_end_late(tmp_path: Path) -> None:
    write_status(tmp_path, None)
    timer = threading.Timer(1.0, write_status, (tmp_path, 0))
    timer.start()
    assert launch(tmp_path, 60.0) == Ending(0)
    timer.join()


@dataclasses.dataclass
class Hosts:
    """What other machines answer."""

    workers: bool
    swept: int = 0

    def tell(self) -> None:
        pass

    def run(self) -> bool:
        return self.workers

    def sweep(self) -> None:
        self.swept += 1


@pytest.mark.parametrize("workers", [True, False])
def test_workers_that_nobody_sees(tmp_path: Path, workers: bool) -> None:
    """They may run on hosts whose disk is another; where there are none, pdsh is stuck."""
    said: list[str] = []
    hosts = Hosts(workers)
    ending = supervise(
        [sys.executable, "-c", "import time; time.sleep(2)"],
        run_dir=tmp_path,
        launch="abc",
        environment=os.environ,
        local_processes=None,
        limits=Limits(hang=0.5),
        elsewhere=hosts,
        say=said.append,
    )
    assert (ending.code, ending.restart) == ((0, False) if workers else (1, True)) and hosts.swept == 1
    assert ("common disk" in said[0]) == workers and "no worker has started within 0.5 s" in said[0]


def test_without_a_common_disk_nobody_is_missed(tmp_path: Path) -> None:
    assert launch(tmp_path, 60.0) == Ending(0)
