"""Whether a run's workers are alive, by the files that they write."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from moe_train.cli import main
from moe_train.launch.live import sign_of_life
from moe_train.training.heartbeat import Beat, Heartbeat
from moe_train.training.worker_status import FOLDER, StatusFile, WorkerStatus

NOW = 1_000_000.0


def write_beat(run: Path, rank: int, age: float, launch: str = "one", host: str = "here") -> None:
    beat = Beat(rank, host, 1, NOW - age, 5, "train", NOW - age, "", 0, False, "")
    (run / FOLDER).mkdir(exist_ok=True)
    (run / FOLDER / f"{launch}.rank_{rank}.beat").write_text(json.dumps(asdict(beat)))


def write_end(run: Path, rank: int, age: float, launch: str = "one", host: str = "here") -> None:
    status = WorkerStatus(rank, 1, host, NOW - 100, exit_code=0, ended=NOW - age)
    (run / FOLDER / f"{launch}.rank_{rank}.json").write_text(json.dumps(asdict(status)))


def alive(run: Path, max_age: float = 60.0) -> bool:
    try:
        sign_of_life(run, max_age, host="here", now=NOW)
    except ValueError:
        return False
    return True


def test_every_rank_must_beat(tmp_path: Path) -> None:
    assert not alive(tmp_path)
    write_beat(tmp_path, 0, age=1)
    write_beat(tmp_path, 1, age=59)
    assert alive(tmp_path)
    assert not alive(tmp_path, max_age=58)
    write_beat(tmp_path, 1, age=61)
    assert not alive(tmp_path)


def test_ranks_of_other_hosts_do_not_count(tmp_path: Path) -> None:
    write_beat(tmp_path, 1, age=1, host="there")
    assert not alive(tmp_path)
    write_beat(tmp_path, 0, age=1)
    write_beat(tmp_path, 1, age=1000, host="there")
    assert alive(tmp_path)


def test_a_launch_that_was_killed_does_not_count(tmp_path: Path) -> None:
    write_beat(tmp_path, 0, age=1000, launch="zero")
    write_beat(tmp_path, 1, age=500, launch="zero")
    assert not alive(tmp_path)
    write_beat(tmp_path, 0, age=2, launch="one")
    assert alive(tmp_path)


def test_a_rank_that_has_ended_need_not_beat(tmp_path: Path) -> None:
    """Rank 0 may write the last checkpoint for long after the others are done."""
    write_beat(tmp_path, 0, age=1)
    write_beat(tmp_path, 1, age=500)
    write_end(tmp_path, 1, age=499)
    assert alive(tmp_path)
    write_beat(tmp_path, 0, age=100)
    assert not alive(tmp_path)
    write_end(tmp_path, 0, age=30)
    assert alive(tmp_path), "all have ended a moment ago"
    write_end(tmp_path, 0, age=70)
    assert not alive(tmp_path)


def test_command_on_the_files_of_a_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = StatusFile(tmp_path, "abc", 0)
    status.start()
    assert main(["live", str(tmp_path)]) == 1
    assert "no worker" in capsys.readouterr().err
    beat = Heartbeat(status.beat_path, 0)
    beat.start()
    assert main(["live", str(tmp_path)]) == 0
    assert "1 workers" in capsys.readouterr().out
    beat.close()
    assert status.beat_path is not None
    content = json.loads(status.beat_path.read_text())
    status.beat_path.write_text(json.dumps(content | {"time": time.time() - 61}))
    assert main(["live", str(tmp_path)]) == 1
    assert "rank 0" in capsys.readouterr().err
    assert main(["live", str(tmp_path), "--max-age", "1000"]) == 0
    assert main(["live", str(tmp_path), "--max-age", "0"]) == 2
