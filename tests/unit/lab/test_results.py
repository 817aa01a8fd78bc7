"""Results of earlier versions are brought up to date, and what a folder holds is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_train.lab.compare import Request, prepare
from moe_train.lab.plan import PlannedRun
from moe_train.lab.results import FORMAT, current_result, evaluation_file, read_result, seeds_in
from moe_train.lab.runner import execute
from moe_train.training.account import active_parameters
from tests.unit.lab.experiments import FakeRunner, planned, write

NEW = ("format", "gate", "alarms_on_at_end")


def finished(folder: Path, runs: list[PlannedRun] | None = None) -> list[PlannedRun]:
    runs = planned(folder) if runs is None else runs
    execute(runs, FakeRunner(), lambda text: None)
    return runs


def as_before(run: PlannedRun) -> dict[str, Any]:
    """The file as the version before the format had a number wrote it."""
    found = read_result(run)
    metrics = {name: value for name, value in found["metrics"].items() if not name.startswith("meter_")}
    for name in ("evaluation_drop_rate", "training_mean_k", "loss_batch_average", "perplexity_batch_average"):
        del metrics[name]
    metrics["drop_rate"] = 0.0
    old = {key: value for key, value in found.items() if key not in NEW}
    old |= {"metrics": metrics, "active_parameters": active_parameters(run.config), "processes": 3}
    (run.folder / "result.json").write_text(json.dumps(old))
    return old


def test_an_older_result_is_written_anew_from_the_evaluation(tmp_path: Path) -> None:
    run = finished(tmp_path)[1]
    expected = read_result(run) | {"processes": 3}
    old = as_before(run)
    assert read_result(run)["metrics"] == old["metrics"]
    assert current_result(run) == expected
    assert expected["format"] == FORMAT and read_result(run) == expected, "the file is the new one"
    assert expected["metrics"]["drop_rate"] == pytest.approx(0.1)
    assert expected["active_parameters"] == active_parameters(run.config, 2.5)


def test_a_result_of_format_2_without_its_evaluation_learns_the_mean_k_of_the_training(tmp_path: Path) -> None:
    run = finished(tmp_path)[1]
    expected = read_result(run)
    old = expected | {"format": 2, "metrics": dict(expected["metrics"])}
    old["metrics"]["evaluation_drop_rate"] = 0.2
    del old["metrics"]["training_mean_k"]
    (run.folder / "result.json").write_text(json.dumps(old))
    evaluation_file(run).unlink()
    found = current_result(run)["metrics"]
    assert found["training_mean_k"] == expected["metrics"]["training_mean_k"] == pytest.approx(3.5)
    assert found["evaluation_drop_rate"] == 0.2 and found["drop_rate"] == pytest.approx(0.1)


@pytest.mark.parametrize("records", ["there", "gone"])
def test_a_result_of_format_3_learns_from_the_records_which_alarms_were_on_at_the_end(
    tmp_path: Path, records: str
) -> None:
    run = finished(tmp_path)[1]
    old = read_result(run) | {"format": 3, "alarms": {"entropy": 2}}
    del old["alarms_on_at_end"]
    (run.folder / "result.json").write_text(json.dumps(old))
    metrics = run.folder / "metrics.jsonl"
    if records == "gone":
        metrics.unlink()
    else:
        began = [{"kind": "alarm", "state": "began", "cause": "entropy", "layer": n, "step": 3} for n in range(2)]
        ended = began[0] | {"state": "ended", "began": 3, "step": 7}
        metrics.write_text(metrics.read_text() + "".join(json.dumps(line) + "\n" for line in [*began, ended]))
    evaluation_file(run).unlink()
    found = current_result(run)
    assert found == old | {"alarms_on_at_end": {"entropy": 1} if records == "there" else None}
    assert read_result(run) == old, "nothing is written"


def test_a_result_of_a_later_version_is_left_as_it_is(tmp_path: Path) -> None:
    run = finished(tmp_path)[0]
    later = read_result(run) | {"format": FORMAT + 1, "more": 1}
    (run.folder / "result.json").write_text(json.dumps(later))
    assert current_result(run) == later == read_result(run)


@pytest.mark.parametrize("evaluation", ["gone", "of another protocol", "damaged"])
def test_without_the_evaluation_an_older_result_says_what_is_known(tmp_path: Path, evaluation: str) -> None:
    run = finished(tmp_path)[1]
    old, path = as_before(run), evaluation_file(run)
    if evaluation == "gone":
        path.unlink()
    elif evaluation == "damaged":
        path.write_text("{")
    else:  # `moe-train evaluate` by hand, on more of the data
        path.write_text(json.dumps(json.loads(path.read_text()) | {"loss": 1.0}))
    found = current_result(run)
    assert found["metrics"]["loss"] == old["metrics"]["loss"]
    assert found["metrics"]["drop_rate"] == pytest.approx(0.1), "of the records of training, which are still there"
    assert found["metrics"]["evaluation_drop_rate"] == 0.0
    assert found["gate"] == "dynamic_k" and found["active_parameters"] == active_parameters(run.config, 2.5)
    assert found["metrics"].get("loss_batch_average") is None
    assert read_result(run) == old, "what cannot be made whole is left as it is"


def test_the_tables_of_older_results(tmp_path: Path) -> None:
    from moe_train.lab.experiment import load_experiment
    from moe_train.lab.writing import write_tables

    runs = finished(tmp_path)
    for run in runs:
        as_before(run)
    evaluation_file(runs[0]).unlink()
    _, _, experiment = load_experiment(str(tmp_path / "two.yaml"))
    facts = {"title": "t", "command": "c"}
    table = write_tables(experiment, runs, tmp_path / "out", facts, figures=False)
    plain = table["arms"][0]["metrics"]
    assert len(plain["loss"]["values"]) == 2 and len(plain["loss_batch_average"]["values"]) == 1


def test_what_is_finished_with_other_seeds_is_in_the_tables(tmp_path: Path) -> None:
    path, out = str(write(tmp_path / "two.yaml")), tmp_path / "out"
    finished(tmp_path, planned(tmp_path, seeds=[3, 1, 20])[:5])
    (out / "plain" / "seed_4").mkdir(parents=True)
    (out / "plain" / "seed_x").mkdir()
    (out / "plain" / "seed_x" / "result.json").write_text("{}")
    assert seeds_in(out, ["plain", "free", "other"]) == [1, 3, 20]
    comparison = prepare(Request(experiment=path, out=out, seeds=[2], only=["free"]))
    assert [run.name for run in comparison.chosen] == ["free, seed 2"]
    assert [run.name for run in comparison.everything] == [
        "plain, seed 1",
        "free, seed 1",
        "plain, seed 2",
        "free, seed 2",
        "plain, seed 3",
        "free, seed 3",
        "plain, seed 20",
    ], "free with seed 20 is neither asked for nor finished"
    with pytest.raises(ValueError, match=r"train\.steps was 8, is 9"):
        prepare(Request(experiment=path, out=out, seeds=[2], steps=9))
