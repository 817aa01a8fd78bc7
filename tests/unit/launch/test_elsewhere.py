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


def test_without_a_common_disk_nobody_is_missed(tmp_path: Path) -> None:
    assert launch(tmp_path, 60.0) == Ending(0)
