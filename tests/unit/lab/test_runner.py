"""What is run, what is not run again, and what is refused, with a runner that starts nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.lab.plan import PlannedRun
from moe_train.lab.results import (
    check_same_experiment,
    differences,
    is_finished,
    is_trained,
    read_result,
)
from moe_train.lab.runner import execute
from moe_train.launch.ending import NOT_SAVED
from tests.unit.lab.experiments import FakeRunner, planned, save


def run_all(runs: list[PlannedRun], runner: FakeRunner) -> tuple[int, list[str], int]:
    ending = execute(runs, runner, lambda text: None)
    return ending.finished, ending.failed, ending.stopped


def test_everything_once(tmp_path: Path) -> None:
    runs = planned(tmp_path)
    names = [run.name for run in runs]
    assert run_all(runs, first := FakeRunner()) == (4, [], 0)
    assert first.trained == first.evaluated == names
    assert run_all(runs, second := FakeRunner()) == (4, [], 0)
    assert second.trained == second.evaluated == []
    assert read_result(runs[0])["metrics"]["loss"] == 4.1


def test_a_stop_ends_and_the_next_call_goes_on(tmp_path: Path) -> None:
    runs = planned(tmp_path)
    assert run_all(runs, FakeRunner([0, 130])) == (1, [], 130)
    assert run_all(runs, again := FakeRunner()) == (4, [], 0)
    assert again.trained == [run.name for run in runs[1:]]


def test_a_stop_that_was_not_waited_for_ends_as_well(tmp_path: Path) -> None:
    assert run_all(planned(tmp_path), FakeRunner([0, NOT_SAVED])) == (1, [], NOT_SAVED)


def test_a_failure_does_not_keep_the_others_and_is_tried_again(tmp_path: Path) -> None:
    runs = planned(tmp_path)
    assert run_all(runs, FakeRunner([1])) == (3, ["plain, seed 1"], 0)
    assert run_all(runs, again := FakeRunner()) == (4, [], 0)
    assert again.trained == ["plain, seed 1"]


def test_a_trained_run_is_only_evaluated(tmp_path: Path) -> None:
    [run, *_] = planned(tmp_path)
    FakeRunner([1]).train(run)
    assert not is_trained(run)
    save(run.folder / "checkpoints", 4)
    assert not is_trained(run)
    save(run.folder / "checkpoints", 8)
    assert is_trained(run) and not is_finished(run)
    assert run_all([run], runner := FakeRunner()) == (1, [], 0)
    assert runner.trained == [] and runner.evaluated == [run.name]


def test_a_finished_run_needs_no_checkpoint(tmp_path: Path) -> None:
    import shutil

    [run, *_] = planned(tmp_path)
    run_all([run], FakeRunner())
    shutil.rmtree(run.folder / "checkpoints")
    assert run_all([run], runner := FakeRunner()) == (1, [], 0)
    assert runner.trained == []


def test_results_of_another_experiment_are_refused_by_what_differs(tmp_path: Path) -> None:
    runs = planned(tmp_path)
    run_all(runs[:1], FakeRunner())
    check_same_experiment(runs, tmp_path / "out", "two.yaml")
    changed = planned(tmp_path, budget={"steps": 9}, overrides={"optimizer.lr": 0.5})
    with pytest.raises(ValueError, match=r"train\.steps was 8, is 9; optimizer\.lr was 0\.001, is 0\.5.*--out"):
        check_same_experiment(changed, tmp_path / "out", "two.yaml")
    changed = planned(tmp_path, evaluation={"limit_batches": 3})
    assert differences(changed[0]) == ["evaluation.limit_batches was null, is 3"]
    more = planned(tmp_path, seeds=[1, 2, 3], arms={"plain": {"parts.router": "softmax_top2"}, "free": {}, "new": {}})
    check_same_experiment(more, tmp_path / "out", "two.yaml")


def test_a_damaged_result_says_what_to_do(tmp_path: Path) -> None:
    [run, *_] = planned(tmp_path)
    run_all([run], FakeRunner())
    (run.folder / "result.json").write_text("{")
    with pytest.raises(ValueError, match="delete it"):
        read_result(run)


def test_an_evaluation_of_another_step_is_no_result(tmp_path: Path) -> None:
    class Early(FakeRunner):
        def evaluate(self, run: PlannedRun, output: Path) -> int:
            super().evaluate(run, output)
            output.write_text(json.dumps(json.loads(output.read_text()) | {"step": 3}))
            return 0

    runs, said = planned(tmp_path)[:2], list[str]()
    ending = execute(runs, Early(), said.append)
    assert ending.failed == [run.name for run in runs], "an error of one run kept the others from running"
    assert sum("step 3, not of the last, 8" in line for line in said) == 2
    assert not any(is_finished(run) for run in runs)
