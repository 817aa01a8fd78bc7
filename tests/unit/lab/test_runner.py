"""What is run, what is not run again, and what is refused, with a runner that starts nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from moe_train.lab.plan import PlannedRun
from moe_train.lab.results import (
    alarms,
    check_same_experiment,
    differences,
    is_finished,
    is_trained,
    measured_flops,
    read_result,
    throughput,
)
from moe_train.lab.runner import execute
from moe_train.training.account import flops_per_token
from moe_train.training.run_config import load_run_config
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


def test_flops_are_counted_with_the_measured_number_of_experts() -> None:
    """Where k is fixed nothing changes; a gate without a bound was counted with all experts."""
    fixed = load_run_config("tiny")
    assert measured_flops(fixed, 2.0) == flops_per_token(fixed).total
    free = load_run_config("tiny", ["parts.router=dynamic_k_free"])
    expert = 3 * 2 * 3 * 64 * 32 * fixed.model.num_layers
    assert measured_flops(free, 8.0) - measured_flops(free, 2.5) == pytest.approx(5.5 * expert)
    assert measured_flops(free, 8.0) == flops_per_token(free).total
    dense = dataclasses.replace(load_run_config("qwen3_0.6b"))
    assert measured_flops(dense, None) == flops_per_token(dense).total


def test_throughput_leaves_out_the_first_interval() -> None:
    records = [
        {"tokens": 100, "tokens_per_second": 1.0},
        {"tokens": 300, "tokens_per_second": 200.0},
        {"tokens": 700, "tokens_per_second": 100.0},
    ]
    assert throughput(records) == pytest.approx(600 / 5.0)
    assert throughput(records[:1]) == 1.0
    assert throughput([]) is None


def test_alarms_that_began_are_counted(tmp_path: Path) -> None:
    """Each layer once, however often it rang there."""
    lines = [
        ("alarm", "began", "entropy", 0),
        ("alarm", "ended", "entropy", 0),
        ("alarm", "began", "entropy", 0),
        ("alarm", "began", "entropy", 2),
        ("train", "", "", 0),
    ]
    records = [dict(zip(("kind", "state", "cause", "layer"), line, strict=True)) for line in lines]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert alarms(tmp_path / "metrics.jsonl") == {"entropy": 2}
    assert alarms(tmp_path / "nothing") == {}
