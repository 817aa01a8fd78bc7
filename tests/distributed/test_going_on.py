"""Runs that stop, restart and go on, through the trainer: what is in place when, and who says from where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def evaluations(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["eval/loss"]) for record in records(folder) if record["kind"] == "eval"]


@pytest.fixture(scope="module")
def validating(processes: Processes, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Options of a run on two ranks that validates after steps 5 and 8, and the folder of one that nothing befell."""
    options = overrides(data, "parallel.expert=2", "eval.every=5", "eval.steps=2", "checkpoint.best=true")
    folder = tmp_path_factory.mktemp("alone")
    assert run(processes, folder, options, Trouble()) == ["", ""]
    assert [step for step, _ in evaluations(folder)] == [5, STEPS]
    return options, folder


@pytest.mark.parametrize(
    ("trouble", "at", "made"),
    [
        (Trouble(stop=4), 5, 0),  # as the step begins: it ends after the next one
        (Trouble(stop=STEPS - 1), STEPS, 1),
        (Trouble(in_validation="stop"), 5, 0),
        (Trouble(in_validation="die"), 3, 0),
    ],
)
def test_no_validation_is_lost(
    processes: Processes, validating: tuple[list[str], Path], tmp_path: Path, trouble: Trouble, at: int, made: int
) -> None:
    """A stop does not wait for one, and gives up one that is under way; the checkpoint is in place before. The run that
    goes on makes it: its records are those of one that nothing befell."""
    options, alone = validating
    died = "InterruptedError: died" if trouble.in_validation == "die" else ""
    assert run(processes, tmp_path, options, trouble) == [died] * 2
    assert latest(tmp_path).name == f"step_{at:08d}" and len(evaluations(tmp_path)) == made
    assert run(processes, tmp_path, options, Trouble(), resume="auto") == ["", ""]
    assert evaluations(tmp_path) == evaluations(alone)
    assert_same_end(tmp_path, alone)
    best = [(folder / "checkpoints" / "best").read_text() for folder in (tmp_path, alone)]
    assert best[0] == best[1]


def test_a_run_that_died_in_a_validation_makes_it_again(
    processes: Processes, validating: tuple[list[str], Path], tmp_path: Path
) -> None:
    """One that was made is not made again by a run that goes on from the same step."""
    options, alone = validating
    options = [*options, "checkpoint.every_steps=5", "checkpoint.asynchronous=false"]
    assert run(processes, tmp_path, options, Trouble(in_validation="die")) == ["InterruptedError: died"] * 2
    assert latest(tmp_path).name == "step_00000005" and evaluations(tmp_path) == []
    assert run(processes, tmp_path, options, Trouble(die=7), resume="auto") == ["InterruptedError: died"] * 2
    assert latest(tmp_path).name == "step_00000005" and evaluations(tmp_path) == evaluations(alone)[:1]
    assert run(processes, tmp_path, options, Trouble(in_validation="die"), resume="auto") != ["", ""]
    assert run(processes, tmp_path, options, Trouble(), resume="auto") == ["", ""]
    assert evaluations(tmp_path) == evaluations(alone)


@pytest.mark.parametrize("stop", [0, 4])
def test_what_a_run_ends_with_must_be_saved(processes: Processes, data: Path, tmp_path: Path, stop: int) -> None:
    """Whatever it does about other saves that fail: a code that says "saved" would be believed."""
    options = overrides(data, "parallel.expert=1", "checkpoint.on_error=continue", "checkpoint.every_steps=2")
    options.append("checkpoint.asynchronous=false")
    (message,) = run(processes, tmp_path, options, Trouble(stop=stop, full_disk_from=3, room_for_records=True))
    last = stop + 1 if stop else STEPS
    assert message.startswith("CheckpointError: ") and f"step_{last:08d} could not be saved: " in message
    assert "No space left" in message
    assert latest(tmp_path).name == "step_00000002" and list(damages(latest(tmp_path))) == []
    errors = [r["step"] for r in records(tmp_path) if r["kind"] == "checkpoint" and "error" in r]
    assert errors == [step for step in (4, 6) if step < last]
    assert not list(tmp_path.glob("checkpoints/*.saving*"))  # its space is needed


def without_times(folder: Path) -> list[dict[str, Any]]:
    """Records in their order, without those of saves."""
    return [
        {key: value for key, value in record.items() if not key.startswith(("tokens_per", "step_sec", "memory"))}
        for record in records(folder)
        if record["kind"] != "checkpoint"
    ]


def test_a_disk_that_is_full_for_a_while(
    processes: Processes, validating: tuple[list[str], Path], tmp_path: Path
) -> None:
    """Records, validations and the save of step 6 fall into that time. All that was recorded is there, once and in
    order; what the failed save had written is gone."""
    options, alone = validating
    options = [*options, "checkpoint.on_error=continue", "checkpoint.asynchronous=false", "logging.csv=true"]
    assert run(processes, tmp_path, options, Trouble(full_disk_from=4, full_disk_until=8)) == ["", ""]
    assert without_times(tmp_path) == without_times(alone)
    saves = [record for record in records(tmp_path) if record["kind"] == "checkpoint"]
    assert [(r["step"], "error" in r) for r in saves] == [(3, False), (5, True), (6, True), (8, False), (8, False)]
    assert (tmp_path / "metrics.csv").read_text().count("\neval,") == 2
    assert_same_end(tmp_path, alone)


def test_a_validation_that_was_not_recorded_is_made_again(
    processes: Processes, validating: tuple[list[str], Path], tmp_path: Path
) -> None:
    """The record of step 5 waited for the disk when the process died."""
    options, alone = validating
    options = [*options, "checkpoint.on_error=continue", "checkpoint.asynchronous=false"]
    died = Trouble(full_disk_from=5, die=7)
    assert run(processes, tmp_path, options, died) == ["InterruptedError: died"] * 2
    assert [record["step"] for record in without_times(tmp_path)] == [1, 2, 3, 4]
    assert run(processes, tmp_path, options, Trouble(), resume="auto") == ["", ""]
    assert without_times(tmp_path) == without_times(alone)


def test_a_rewind_with_a_full_disk(processes: Processes, data: Path, tmp_path: Path) -> None:
    """The run goes back in place: what it writes as it begins anew waits as well."""
    options = overrides(data, "parallel.expert=2", "guard.non_finite=rewind", "guard.rewind_steps=1")
    options.append("checkpoint.asynchronous=false")
    assert run(processes, tmp_path / "alone", options, Trouble(bad=[5])) == ["", ""]
    options = [*options, "checkpoint.on_error=continue"]
    trouble = Trouble(bad=[5], full_disk_from=5, full_disk_until=8)
    assert run(processes, tmp_path / "run", options, trouble) == ["", ""]
    assert without_times(tmp_path / "run") == without_times(tmp_path / "alone")
    assert_same_end(tmp_path / "run", tmp_path / "alone")
