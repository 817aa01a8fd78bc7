"""TensorBoard, CSV, W&B, and how callbacks are put together."""

from __future__ import annotations

import csv
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.training.callbacks.base import Callback, Callbacks, RunInfo, Status
from moe_train.training.callbacks.build import build_callbacks
from moe_train.training.callbacks.csv_file import CsvWriter
from moe_train.training.callbacks.heatmap import load_image, relative_load
from moe_train.training.callbacks.tags import scalar_tags
from moe_train.training.callbacks.tensorboard import TensorBoardWriter
from moe_train.training.callbacks.wandb_logger import WandbLogger
from moe_train.training.options import LoggingOptions

RECORD = {
    "kind": "train",
    "step": 10,
    "tokens": 500,
    "loss": 3.5,
    "lr": 0.01,
    "grad_norm": 1.5,
    "tokens_per_second": 100.0,
    "step_seconds": 0.5,
    "memory_bytes": 1024,
    "aux/switch": 1.25,
    "balance/gini": 0.25,
    "balance/layer_0/gini": 0.25,
    "load": [[4, 0, 2, 2]],
}
EVAL = {"kind": "eval", "step": 10, "eval/loss": 3.0, "eval/perplexity": 20.0, "balance": {"gini": 0.5}}


def run_info(folder: Path, step: int = 0) -> RunInfo:
    return RunInfo("run", folder, total_steps=100, start_step=step, config={"seed": 1})


def test_tags() -> None:
    tags = scalar_tags(RECORD)
    assert tags == {
        "train/tokens": 500,
        "train/loss": 3.5,
        "train/lr": 0.01,
        "train/grad_norm": 1.5,
        "perf/tokens_per_second": 100.0,
        "perf/step_seconds": 0.5,
        "perf/memory_bytes": 1024,
        "train/aux/switch": 1.25,
        "balance/gini": 0.25,
        "balance/layer_0/gini": 0.25,
    }
    assert scalar_tags(EVAL) == {"eval/loss": 3.0, "eval/perplexity": 20.0, "eval/balance/gini": 0.5}


def read_tensorboard(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    return events.Reload()


def test_tensorboard_scalars_and_images(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path, image_every=2)
    writer.on_start(run_info(tmp_path))
    for step in (10, 20, 30):
        writer.on_record({**RECORD, "step": step})
    writer.on_record(EVAL)
    writer.on_end("finished")
    events = read_tensorboard(tmp_path)
    assert set(events.Tags()["scalars"]) == {*scalar_tags(RECORD), *scalar_tags(EVAL)}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 3.5), (20, 3.5), (30, 3.5)]
    assert [image.step for image in events.Images("balance/load")] == [10, 30]


def test_tensorboard_resume_shows_no_step_twice(tmp_path: Path) -> None:
    for start, steps in ((0, (10, 20, 30)), (10, (20, 30))):
        writer = TensorBoardWriter(tmp_path)
        writer.on_start(run_info(tmp_path, start))
        for step in steps:
            writer.on_record({**RECORD, "step": step, "loss": float(start)})
        writer.on_end("failed")
    points = [(e.step, e.value) for e in read_tensorboard(tmp_path).Scalars("train/loss")]
    assert points == [(10, 0.0), (20, 10.0), (30, 10.0)]


def test_tensorboard_of_a_run_that_starts_again_from_step_0(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        writer = TensorBoardWriter(tmp_path)
        writer.on_start(run_info(tmp_path, 0))
        writer.on_record({**RECORD, "step": 10, "loss": value})
        writer.on_end("failed")
    assert [(e.step, e.value) for e in read_tensorboard(tmp_path).Scalars("train/loss")] == [(10, 2.0)]


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_csv_grows_columns_and_resumes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    writer = CsvWriter(path)
    writer.on_start(run_info(tmp_path))
    writer.on_record(RECORD)
    writer.on_record(EVAL)
    writer.on_record({**RECORD, "step": 20})
    assert [(row["kind"], row["step"], row["train/loss"], row["eval/loss"]) for row in rows(path)] == [
        ("train", "10", "3.5", ""),
        ("eval", "10", "", "3.0"),
        ("train", "20", "3.5", ""),
    ]
    with open(path, "a") as file:
        file.write("train,3")  # torn

    writer = CsvWriter(path)
    writer.on_start(run_info(tmp_path, step=10))
    writer.on_record({**RECORD, "step": 20, "loss": 1.0})
    assert [(row["step"], row["train/loss"]) for row in rows(path)] == [("10", "3.5"), ("10", ""), ("20", "1.0")]
    assert all(None not in row for row in rows(path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_csv_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CsvWriter(tmp_path / "metrics.csv")
    writer.on_start(run_info(tmp_path))
    writer.on_record(RECORD)
    writer.path.unlink()
    writer.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="cannot write metrics"):
        writer.on_record({**RECORD, "step": 11})


def test_wandb_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install moe-train\[wandb\]"):
        WandbLogger().on_start(run_info(tmp_path))


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in with W&B's three calls: wandb itself is no dependency of the tests."""
    logged: list[Any] = []

    class Run:
        id = "abc"

        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, values))

        def finish(self, exit_code: int) -> None:
            logged.append(exit_code)

    def init(**arguments: Any) -> Run:
        logged.append(arguments["id"])
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for start in (0, 10):
        logger = WandbLogger()
        logger.on_start(run_info(tmp_path, start))
        logger.on_record(EVAL)
        logger.on_end("interrupted")
    assert logged == [None, (10, scalar_tags(EVAL)), 0, "abc", (10, scalar_tags(EVAL)), 0]


def test_build_follows_the_options(tmp_path: Path) -> None:
    def names(options: LoggingOptions, rank: int = 0) -> list[str]:
        return [type(callback).__name__ for callback in build_callbacks(options, tmp_path, rank).callbacks]

    assert names(LoggingOptions()) == ["JsonlWriter", "Console", "TensorBoardWriter"]
    everything = LoggingOptions(tensorboard=False, csv=True, wandb=True)
    assert names(everything) == ["JsonlWriter", "Console", "CsvWriter", "WandbLogger"]
    assert names(everything, rank=1) == []


def test_one_callback_that_cannot_end_does_not_keep_the_others_open(capsys: pytest.CaptureFixture[str]) -> None:
    ended: list[Status] = []

    class Bad(Callback):
        def on_end(self, status: Status) -> None:
            raise OSError("no space")

    class Good(Callback):
        def on_end(self, status: Status) -> None:
            ended.append(status)

    Callbacks([Bad(), Good()]).on_end("failed")
    assert ended == ["failed"]
    assert "Bad could not end cleanly: no space" in capsys.readouterr().err


def test_heat_map_colours() -> None:
    image = load_image([[10, 10, 10, 10], [40, 0, 1, 1], [0, 0, 0, 0]], cell=2)
    assert image.shape == (6, 8, 3) and image.dtype == np.uint8
    white, dead = np.array([247, 247, 245]), np.array([45, 45, 45])
    assert (image[0] == white).all()
    assert (image[2, 2] == dead).all() and (image[4] == dead).all()
    red, _, blue = image[2, 0].astype(int)
    assert red > blue, "overloaded is orange"
    red, _, blue = image[2, 4].astype(int)
    assert blue > red, "underloaded is blue"
    np.testing.assert_allclose(relative_load([[3, 1]]), [[1.5, 0.5]])
