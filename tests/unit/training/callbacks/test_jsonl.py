from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from moe_train.training.callbacks.base import MetricsWriteError, RunInfo
from moe_train.training.callbacks.jsonl import JsonlWriter


def start(path: Path, step: int = 0) -> JsonlWriter:
    writer = JsonlWriter(path)
    writer.on_start(RunInfo("run", path.parent, total_steps=100, start_step=step))
    return writer


def steps(path: Path) -> list[tuple[str, int]]:
    return [(record["kind"], record["step"]) for record in map(json.loads, path.read_text().splitlines())]


def test_each_record_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = start(path)
    writer.on_record({"kind": "train", "step": 1, "loss": 2.5, "load": [[1, 2]]})
    assert json.loads(path.read_text()) == {"kind": "train", "step": 1, "loss": 2.5, "load": [[1, 2]]}
    writer.on_record({"kind": "eval", "step": 1})
    assert steps(path) == [("train", 1), ("eval", 1)]
    writer.on_end("finished")


def test_resume_drops_later_records_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = start(path)
    for step in range(10, 60, 10):
        writer.on_record({"kind": "train", "step": step})
    writer.on_record({"kind": "eval", "step": 30})
    writer.on_end("failed")
    with open(path, "a") as file:
        file.write('{"kind": "train", "st')

    writer = start(path, step=30)
    writer.on_record({"kind": "train", "step": 40})
    writer.on_end("finished")
    assert steps(path) == [("train", 10), ("train", 20), ("train", 30), ("eval", 30), ("train", 40)]


def test_nan_is_written_as_null_so_that_every_reader_can_go_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record = {"kind": "train", "step": 1, "loss": float("nan"), "balance": {"x": float("inf")}, "l": [1.5]}
    start(path).on_record(record)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record["loss"] is None and record["balance"] == {"x": None} and record["l"] == [1.5]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    writer = start(path)
    with pytest.raises(MetricsWriteError, match="No space left.*free some space") as caught:
        writer.on_record({"kind": "train", "step": 1})
    assert caught.value.errno == errno.ENOSPC and str(path) in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    writer.on_end("failed")


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MetricsWriteError, match="cannot write metrics"):
        start(tmp_path / "file" / "metrics.jsonl")
