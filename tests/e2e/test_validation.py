"""Validation data is opened at the start of a run, and not again."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any
from unittest import mock

from tests.e2e.conftest import overrides


def train_and_count(run: Path, arguments: list[str]) -> list[tuple[str, int]]:
    """Trains on a process of a pool; returns each data set that was opened, with the steps that were taken before."""
    from moe_train.data import members
    from moe_train.training import trainer
    from moe_train.training.run_config import load_run_config
    from moe_train.training.stop import StopRequest

    opened: list[tuple[str, int]] = []
    steps = 0

    def step(*given: Any, **more: Any) -> Any:
        nonlocal steps
        steps += 1
        return take(*given, **more)

    def open_dataset(name: str) -> Any:
        opened.append((Path(name).name, steps))
        return really(name)

    take, really = trainer.train_step, members.open_dataset
    with (
        mock.patch.object(trainer, "train_step", step),
        mock.patch.object(members, "open_dataset", open_dataset),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        assert trainer.train(load_run_config("tiny", arguments), run, None, StopRequest())
    return opened


def test_data_sets_are_opened_once(processes: Any, data: Path, tmp_path: Path) -> None:
    """Nothing is lost by it: every evaluation of the same weights gives the same."""
    same = ["optimizer.lr=0", "train.steps=3", "eval.every=1", "eval.steps=2"]
    [opened] = processes(1).run(train_and_count, run=tmp_path / "run", arguments=overrides(data, *same))
    processes(1).close()
    assert sorted(opened) == [("train", 0), ("validation", 0)]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [{**record, "step": 0} for record in records if record["kind"] == "eval"]
    assert len(evaluations) == 3 and evaluations[0] == evaluations[1] == evaluations[2]


def test_without_evaluations_it_is_not_opened(processes: Any, data: Path, tmp_path: Path) -> None:
    arguments = overrides(data, "train.steps=1", "eval.every=0")
    [opened] = processes(1).run(train_and_count, run=tmp_path / "run", arguments=arguments)
    processes(1).close()
    assert opened == [("train", 0)]
