"""What a worker says it is doing."""

from __future__ import annotations

import dataclasses
import errno
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch.distributed as dist

from moe_train.parallel.collectives import LastCollective
from moe_train.training import heartbeat
from moe_train.training.heartbeat import Heartbeat, describe, read_beats
from moe_train.training.worker_status import StatusFile, cannot_write, forget, read_statuses
from tests.unit.little_room import little_room


@pytest.fixture
def beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Heartbeat:
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.02)
    return Heartbeat(StatusFile(tmp_path, "abc", 3).beat_path, 3)


def wait_for(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_it_says_step_phase_and_place(tmp_path: Path, beat: Heartbeat) -> None:
    beat.start()
    beat.note("train", 7)
    wait_for(lambda: read_beats(tmp_path, "abc") and read_beats(tmp_path, "abc")[0].step == 7)
    (found,) = read_beats(tmp_path, "abc")
    assert (found.rank, found.phase) == (3, "train") and "wait_for" in found.where
    beat.note("save")
    wait_for(lambda: read_beats(tmp_path, "abc")[0].phase == "save")
    assert read_beats(tmp_path, "abc")[0].step == 7
    beat.close()
    assert read_beats(tmp_path, "other") == []


def test_a_process_that_stands_still_makes_no_progress(tmp_path: Path, beat: Heartbeat) -> None:
    """It goes on to write, and the time of progress stays; then it works again."""
    release = threading.Event()
    timer = threading.Timer(0.6, release.set)
    beat.start()
    timer.start()
    release.wait()
    (found,) = read_beats(tmp_path, "abc")
    assert found.time - found.progress > 0.3
    wait_for(lambda: (now := read_beats(tmp_path, "abc")[0]).time - now.progress < 0.3)
    beat.close()


def test_nobody_asked(tmp_path: Path) -> None:
    quiet = Heartbeat(StatusFile(tmp_path, "", 0).beat_path, 0)
    quiet.start()
    quiet.note("train", 1)
    quiet.close()
    assert list(tmp_path.iterdir()) == []


def test_a_line_for_a_person(beat: Heartbeat) -> None:
    now = time.time()
    waiting = dataclasses.replace(
        beat.now(), host="node-1", time=now, step=12, phase="train", progress=now - 90,
        collective="all_to_all_single", collective_number=345, inside=True, where="a.py:1 f > b.py:2 g",
    )  # fmt: skip
    assert describe(waiting, now) == (
        "rank 3 on node-1: step 12, train, nothing new for 90 s, in collective all_to_all_single (number 345), "
        "at a.py:1 f > b.py:2 g"
    )
    gone = dataclasses.replace(waiting, time=now - 400, inside=False, progress=now)
    assert "last collective" in describe(gone, now) and "no sign of life for 400 s" in describe(gone, now)


def test_collectives_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    last = LastCollective()
    seen: list[tuple[str, bool]] = []

    def collective() -> int:
        seen.append((last.name, last.inside))
        return 5

    monkeypatch.setattr(dist, "all_reduce", collective)
    for name in ("barrier", "broadcast"):
        monkeypatch.setattr(dist, name, getattr(dist, name))
    before = {name: getattr(dist, name) for name in dir(dist)}
    last.watch()
    try:
        assert dist.all_reduce() == 5
    finally:
        for name, value in before.items():
            setattr(dist, name, value)
    assert seen == [("all_reduce", True)] and not last.inside and last.number == 1


def test_a_disk_that_is_full(tmp_path: Path, beat: Heartbeat, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file can be made any more: those that are there tell on, of a process that may go on for long."""
    status = StatusFile(tmp_path, "abc", 3)
    status.start()
    beat.note("validate", 1_000_000)
    beat.start()
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_text", Mock(side_effect=full))
    for step in (7, 12_345_678_901):
        beat.note("train", step)
        wait_for(lambda step=step: [found.step for found in read_beats(tmp_path, "abc")] == [step])
    beat.close()
    status.finish(2, "no space is left " * 20)
    (ended,) = read_statuses(tmp_path, "abc")
    assert (ended.exit_code, ended.error) == (2, "no space is left " * 20)
    assert [path.name for path in (tmp_path / "processes").glob("*.tmp")] == []
    with pytest.raises(OSError, match="No space"):
        StatusFile(tmp_path, "new", 0).start()


def test_whether_a_disk_takes_files(tmp_path: Path) -> None:
    StatusFile(tmp_path, "abc", 0).start()
    before = sorted(tmp_path.rglob("*"))
    assert cannot_write(tmp_path) == "" and sorted(tmp_path.rglob("*")) == before
    assert cannot_write(tmp_path / "nowhere") == "No such file or directory"


def test_a_worker_that_cannot_say_that_it_is_there_names_the_file(tmp_path: Path) -> None:
    """As on a disk that is full from the start: no earlier file is there to be written over."""
    file = StatusFile(tmp_path, "abc", 3)
    with pytest.raises(OSError, match=f"File too large: '{file.path}'"), little_room(1024):
        file.start()
    assert not list((tmp_path / "processes").iterdir())


@pytest.mark.parametrize("moment", ["write_text", "is_dir"])
def test_a_launch_that_ends_removes_the_folder_while_another_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The last that leaves an empty folder removes it: just before a file is made in it, or when mkdir has met it and
    looks what it is."""
    StatusFile(tmp_path, "before", 0).start()
    (tmp_path / "processes" / "before.rank_0.json").unlink()
    leaving, seen = ["before"], getattr(Path, moment)

    def at_that_moment(path: Path, *args: object, **options: object) -> object:
        if leaving:
            forget(tmp_path, leaving.pop())
            assert not (tmp_path / "processes").exists()
        return seen(path, *args, **options)

    file = StatusFile(tmp_path, "now", 1)
    with monkeypatch.context() as patched:
        patched.setattr(Path, moment, at_that_moment)
        file.start()
    assert not leaving and len(read_statuses(tmp_path, "now")) == 1
