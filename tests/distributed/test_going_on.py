"""Runs that stop, restart and go on, through the trainer: what is in place when, and who says from where."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.checkpoint.verify import damages
from tests.distributed.harness import guarding
from tests.distributed.harness.expected import Processes
from tests.distributed.harness.guarding import Trouble
from tests.distributed.test_rewind import STEPS, assert_same_end, overrides, run
from tests.distributed.test_rewind import data as data  # the fixture
from tests.e2e.checkpoints import latest, records


def test_rank_0_says_where_all_go_on(processes: Processes, data: Path, tmp_path: Path) -> None:
    """The others may have been started as for a new run: a node that torchrun's agents have met anew."""
    options = overrides(data, "parallel.expert=2")
    assert run(processes, tmp_path / "run", options, Trouble(stop=5)) == ["", ""]
    found = processes(2).run(guarding.run_of_rank_0, run_dir=str(tmp_path / "run"), overrides=options, timeout=600)
    assert found == ["", ""]
    assert run(processes, tmp_path / "alone", options, Trouble()) == ["", ""]
    assert_same_end(tmp_path / "run", tmp_path / "alone")


def test_without_latest_a_run_goes_on_all_the_same(processes: Processes, data: Path, tmp_path: Path) -> None:
    options = overrides(data, "parallel.expert=1")
    assert run(processes, tmp_path / "run", options, Trouble(stop=5)) == [""]
    (tmp_path / "run" / "checkpoints" / "latest").unlink()
    assert run(processes, tmp_path / "run", options, Trouble(), resume="auto") == [""]
    assert [r["step"] for r in records(tmp_path / "run") if r["kind"] == "train"] == list(range(1, STEPS + 1))


def test_a_stop_does_not_wait_for_a_validation(processes: Processes, data: Path, tmp_path: Path) -> None:
    """The checkpoint is in place first, and the run validates when it goes on: the records are those of one that was
    never stopped."""
    options = overrides(data, "parallel.expert=1", "eval.every=5", "eval.steps=1")
    stopped, alone = tmp_path / "stopped", tmp_path / "alone"
    assert run(processes, stopped, options, Trouble(stop=4)) == [""]  # as the step begins: it ends after the next one
    assert latest(stopped).name == "step_00000005"
    assert [r["step"] for r in records(stopped) if r["kind"] == "eval"] == []
    assert run(processes, stopped, options, Trouble(), resume="auto") == [""]
    assert run(processes, alone, options, Trouble()) == [""]
    found = [
        [(r["step"], r["eval/loss"]) for r in records(folder) if r["kind"] == "eval"] for folder in (stopped, alone)
    ]
    assert found[0] == found[1] and [step for step, _ in found[0]] == [5, STEPS]


@pytest.mark.parametrize("stop", [0, 4])
def test_what_a_run_ends_with_must_be_saved(processes: Processes, data: Path, tmp_path: Path, stop: int) -> None:
    """Whatever it does about other saves that fail: a code that says "saved" would be believed."""
    options = overrides(data, "parallel.expert=1", "checkpoint.on_error=continue", "checkpoint.every_steps=2")
    options.append("checkpoint.asynchronous=false")
    (message,) = run(processes, tmp_path, options, Trouble(stop=stop, full_disk_from=3))
    last = stop + 1 if stop else STEPS
    assert message.startswith("CheckpointError: ") and f"step_{last:08d} could not be saved: " in message
    assert "No space left" in message
    assert latest(tmp_path).name == "step_00000002" and list(damages(latest(tmp_path))) == []
    errors = [r["step"] for r in records(tmp_path) if r["kind"] == "checkpoint" and "error" in r]
    assert errors == [step for step in (4, 6) if step < last]
