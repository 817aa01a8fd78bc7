"""Writers of metrics whose disk takes nothing, or a part only. The limit on the size of files stands in for a full
disk: it cuts a write off in the middle, too."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_train.training.callbacks.appended import Appended
from moe_train.training.callbacks.base import Callback, MetricsWriteError, Record, RunInfo, write_error
from moe_train.training.callbacks.build import build_callbacks
from moe_train.training.callbacks.console import Console
from moe_train.training.callbacks.csv_file import CsvWriter
from moe_train.training.callbacks.jsonl import JsonlWriter
from moe_train.training.callbacks.keeps_trying import KeepsTrying
from moe_train.training.callbacks.tensorboard import TensorBoardWriter
from moe_train.training.options import CheckpointOptions, LoggingOptions
from moe_train.training.side_files import spared


@contextmanager
def full_from(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run_info(folder: Path, step: int = 0) -> RunInfo:
    return RunInfo("run", folder, total_steps=100, start_step=step)


def train(step: int, **more: float) -> Record:
    return {"kind": "train", "step": step, "loss": 1 / step, "load": [[step, 1]], **more}


def test_a_write_that_is_cut_off_leaves_no_part(tmp_path: Path) -> None:
    file = Appended(tmp_path / "file")
    file.append(b"first\n")
    with full_from(9):
        for _ in range(2):
            with pytest.raises(OSError, match="too large"):
                file.append(b"second\n")
            assert file.path.read_bytes() == b"first\n"
    file.append(b"second\n")
    assert file.path.read_bytes() == b"first\nsecond\n"


def test_a_part_that_cannot_be_cut_off_at_once_is_cut_off_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Appended(tmp_path / "file")
    file.append(b"first\n")

    def fails(descriptor: int, length: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with full_from(9), monkeypatch.context() as patch, pytest.raises(OSError, match="too large"):
        patch.setattr(os, "ftruncate", fails)
        file.append(b"second\n")
    assert file.path.read_bytes() == b"first\nsec"
    file.append(b"third\n")
    assert file.path.read_bytes() == b"first\nthird\n"


def test_what_others_have_written_stays(tmp_path: Path) -> None:
    file = Appended(tmp_path / "file")
    file.append(b"first\n")
    with open(file.path, "ab") as other:
        other.write(b"a note\n")
    file.append(b"second\n")
    assert file.path.read_bytes() == b"first\na note\nsecond\n"


def test_jsonl_that_ends_the_run_leaves_whole_lines(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.on_start(run_info(tmp_path))
    writer.on_record(train(1))
    with full_from(writer.path.stat().st_size + 5), pytest.raises(MetricsWriteError, match="cannot write metrics"):
        writer.on_record(train(2))
    assert [json.loads(line)["step"] for line in writer.path.read_text().splitlines()] == [1]


def test_records_wait_for_the_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is there once and in order; both the failure and its end are said once."""
    path = tmp_path / "metrics.jsonl"
    writer = KeepsTrying(JsonlWriter(path), path.name)
    writer.on_start(run_info(tmp_path))
    writer.on_record(train(1))
    assert capsys.readouterr().err == ""
    with full_from(path.stat().st_size + 5):
        for step in (2, 3, 4):
            writer.on_record(train(step))
            assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"cannot write metrics to {path} (File too large)" in said
    assert "checkpoint.on_error=continue" in said
    writer.on_record(train(5))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "can be written again: 4 records that had to wait went into it" in said
    writer.on_record(train(6))
    writer.on_end("finished")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [train(step) for step in range(1, 7)]
    assert capsys.readouterr().err == ""


def test_so_many_records_wait_and_the_others_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = KeepsTrying(JsonlWriter(path), path.name, keep=2)
    writer.on_start(run_info(tmp_path))
    with full_from(5):
        for step in (1, 2, 3):
            writer.on_record(train(step))
    writer.on_record(train(4))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 3, 4]
    assert "1 record before them got lost" in capsys.readouterr().err
    with full_from(path.stat().st_size):
        writer.on_record(train(5))
        writer.on_end("failed")
    assert "metrics.jsonl lacks 1 record of this run" in capsys.readouterr().err


def test_the_end_is_another_try(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = KeepsTrying(JsonlWriter(path), path.name)
    writer.on_start(run_info(tmp_path))
    with full_from(5):
        writer.on_record(train(1))
    writer.on_end("finished")
    assert json.loads(path.read_text()) == train(1) and "lacks" not in capsys.readouterr().err


def test_a_start_waits_too(tmp_path: Path) -> None:
    """As after a rewind: what was recorded beyond it goes before anything new is written."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(train(step)) + "\n" for step in (1, 2, 3)))
    writer = KeepsTrying(JsonlWriter(path), path.name)
    with full_from(5):
        writer.on_start(run_info(tmp_path, step=1))
        writer.on_record(train(2, again=1))
        assert len(path.read_text().splitlines()) == 3
        assert [file.name for file in tmp_path.iterdir()] == [path.name]  # no part of a file takes up space
    writer.on_record(train(3, again=1))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        *(train(1), train(2, again=1), train(3, again=1))
    ]


def test_rows_and_columns_wait_for_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    writer = KeepsTrying(CsvWriter(path), path.name)
    writer.on_start(run_info(tmp_path))
    writer.on_record(train(1))
    with full_from(path.stat().st_size + 3):
        writer.on_record(train(2))
        writer.on_record(train(3, lr=0.5))
        with open(path, newline="") as file:
            assert [row["step"] for row in csv.DictReader(file)] == ["1"]
    writer.on_record(train(4, lr=0.25))
    with open(path, newline="") as file:
        found = [(row["step"], row["train/loss"], row["train/lr"]) for row in csv.DictReader(file)]
    assert found == [("1", "1.0", ""), ("2", "0.5", ""), ("3", repr(1 / 3), "0.5"), ("4", "0.25", "0.25")]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_goes_on_in_a_new_file(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = KeepsTrying(TensorBoardWriter(tmp_path, image_every=2), "tensorboard")
    writer.on_start(run_info(tmp_path))
    writer.on_record(train(1))
    (events,) = tmp_path.iterdir()
    with full_from(events.stat().st_size + 5):
        for step in (2, 3, 4):
            writer.on_record(train(step))
        assert list(tmp_path.iterdir()) == [events]
    writer.on_record(train(5))
    writer.on_end("finished")
    assert len(list(tmp_path.iterdir())) == 2
    found = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "scalars": 0}).Reload()
    assert [point.step for point in found.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert [image.step for image in found.Images("balance/load")] == [1, 3, 5]


class FullLog(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_on_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        Console(FullLog()).on_start(run_info(tmp_path, step=3))
    Console(FullLog(), goes_on=True).on_start(run_info(tmp_path, step=3))


def test_only_a_run_that_goes_on_keeps_trying(tmp_path: Path) -> None:
    def kinds(*, goes_on: bool) -> list[bool]:
        options = LoggingOptions(csv=True)
        callbacks = build_callbacks(options, tmp_path, goes_on=goes_on).callbacks
        return [isinstance(callback, KeepsTrying) for callback in callbacks]

    assert kinds(goes_on=False) == [False] * 4
    assert kinds(goes_on=True) == [True, False, True, True]


def test_other_errors_of_a_writer_are_not_hidden(tmp_path: Path) -> None:
    class Broken(Callback):
        def on_record(self, record: Record) -> None:
            raise write_error(tmp_path, OSError(28, "No space")) if record["step"] == 1 else ValueError("broken")

    writer = KeepsTrying(Broken(), "broken")
    writer.on_record(train(1))
    writer._waiting.clear()
    with pytest.raises(ValueError, match="broken"):
        writer.on_record(train(2))


def test_files_that_training_can_do_without(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        spared(CheckpointOptions(on_error="stop"), "rewinds.json", fails)
    assert capsys.readouterr().err == ""
    spared(CheckpointOptions(on_error="continue"), "rewinds.json", fails)
    assert "cannot write rewinds.json: [Errno 28] No space left on device. The run goes on" in capsys.readouterr().err
