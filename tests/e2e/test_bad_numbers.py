"""A run whose numbers go bad by themselves, through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.checkpoints import latest, records
from tests.e2e.conftest import moe_train, overrides


@pytest.mark.slow
def test_weights_that_are_lost_stop_the_run(data: Path, tmp_path: Path) -> None:
    """A learning rate that throws the weights out of float32: no step after the first is finite. Three are skipped, the
    fourth stops the run for good, though it might be started again; the report says so."""
    run = tmp_path / "run"
    options = ["train.steps=20", "checkpoint.every_steps=1", "optimizer.lr=1e30", "schedule.warmup_steps=0"]
    options += ["logging.every=1", "logging.tensorboard=false", "eval.every=0"]
    arguments = [*overrides(data, *options), "--run-dir", run, "--processes", 1, "--max-restarts", 3]
    result = moe_train("train", "tiny", *arguments)
    assert result.returncode == 3, result.stdout[-2000:] + result.stderr[-3000:]
    assert "restart 1" not in result.stderr and "Traceback" not in result.stderr
    assert "guard.max_in_a_row = 3" in result.stderr and "(docs/guard.md)" in result.stderr
    assert "BAD NUMBERS, skip" in result.stdout and "bad numbers: 3 steps skipped" in result.stdout
    found = [record for record in records(run) if record["kind"] == "guard"]
    assert [record["action"] for record in found] == ["skip", "skip", "skip", "stop"]
    first = found[0]["bad_step"]
    assert [record["bad_step"] for record in found] == list(range(first, first + 4))
    assert all(record["documents"] and record["cause"] in ("loss", "gradient") for record in found)
    assert int(latest(run).name.removeprefix("step_")) == first + 2
    result = moe_train("report", run)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Bad numbers" in (run / "report.html").read_text() and "3 x skip" in (run / "report.html").read_text()
