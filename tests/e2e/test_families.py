"""Runs of families whose layers do not all have experts: train, evaluate, report."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.e2e.checkpoints import records
from tests.e2e.conftest import moe_train, overrides

DENSE = ["model.family=llama3", "model.ffn_hidden_size=96", "model.tie_embeddings=true"]
MIXED = [
    "model.family=deepseek_v3",
    "model.num_layers=3",
    "model.dense_layers=[0,2]",
    "model.ffn_hidden_size=96",
    "model.moe.shared_expert_hidden_size=16",
    "model.multi_token.layers=1",
    "model.latent_attention.query_rank=24",
    "model.latent_attention.key_value_rank=16",
    "model.latent_attention.nope_head_dim=16",
    "model.latent_attention.rope_head_dim=8",
    "model.latent_attention.value_head_dim=16",
    "router.balancing.bias.rate=0.01",
    "train.zero_stage=3",
    "parallel.expert=2",
]


def finished(data: Path, run: Path, processes: int, *model: str) -> dict[str, object]:
    """Trains, evaluates and reports; the evaluation."""
    alarm = ("alarm.quiet_steps=2", "alarm.window=1", "alarm.min_slots=1", "alarm.load_share=0.99")  # rings for sure
    arguments = overrides(
        data, *model, *alarm, "train.steps=6", "train.global_batch_size=8", "train.micro_batch_size=2", "eval.every=3",
        "checkpoint.every_steps=3", "logging.csv=true",
    )  # fmt: skip
    result = moe_train("train", "tiny", *arguments, "--processes", processes, "--run-dir", run)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    experts = "moe" in str(model)
    assert ("collapse alarm: " in result.stdout) == experts
    more = ["--trace", run / "trace.parquet", "--against", 3] if experts else []
    result = moe_train("evaluate", run, *more)
    assert result.returncode == 0, result.stderr[-3000:]
    printed = result.stdout
    result = moe_train("report", run)
    assert result.returncode == 0, result.stderr[-3000:]
    [path] = (run / "evaluation").glob("*.json")
    evaluation: dict[str, object] = json.loads(path.read_text())
    assert ("gini" in printed.lower()) == bool(evaluation["layers"])
    return evaluation


def tags_of(run: Path) -> tuple[set[str], set[str]]:
    """Scalars and images that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return set(events.Tags()["scalars"]), set(events.Tags()["images"])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_model_without_experts_has_no_balance(data: Path, tmp_path: Path, processes: int) -> None:
    evaluation = finished(data, tmp_path / "run", processes, *DENSE)
    assert evaluation["layers"] == [] and evaluation["mean"] == {}
    for record in records(tmp_path / "run"):
        assert not [key for key in record if "balance" in key or key in ("load", "layers")]
    scalars, images = tags_of(tmp_path / "run")
    assert "train/loss" in scalars and "eval/loss" in scalars and not images
    assert not [tag for tag in scalars if "balance" in tag]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Gini" not in page and "Expert load in training" not in page


@pytest.mark.slow
def test_mixed_layers_keep_their_numbers(data: Path, tmp_path: Path) -> None:
    evaluation = finished(data, tmp_path / "run", 2, *MIXED)
    assert [layer["layer"] for layer in evaluation["layers"]] == [1]  # type: ignore[attr-defined]
    train = [record for record in records(tmp_path / "run") if record["kind"] == "train"]
    for record in train:
        assert record["layers"] == [1, 3]
        assert [sum(load) for load in record["load"]] == [8 * 32 * 2] * 2
        assert 0 < record["aux/multi_token"] < 10
        numbered = {key.split("/")[1] for key in record if key.startswith("balance/layer_")}
        assert numbered == {"layer_1", "layer_3"}
    scalars, images = tags_of(tmp_path / "run")
    assert {"train/aux/multi_token", "balance/layer_1/gini", "balance/layer_3/gini"} <= scalars and images
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Balance over time" in page and "Expert load in training" in page
    alarms = [record for record in records(tmp_path / "run") if record["kind"] == "alarm"]
    assert {(record["layer"], record["step"]) for record in alarms if record["state"] == "began"} >= {(1, 3), (3, 3)}
    assert "alarm/load_share" in scalars and "router.balancing.bias.rate (it is 0.01)" in alarms[0]["advice"]
    trace = pq.read_table(tmp_path / "run" / "trace.parquet").to_pylist()
    [layer] = evaluation["layers"]  # type: ignore[misc]
    load = Counter(expert for row in trace for expert in row["experts"])
    assert [load[expert] for expert in range(len(layer["load"]))] == layer["load"]
    assert len({(row["sample"], row["position"]) for row in trace}) == len(trace) == evaluation["routed_tokens"]
    stability = evaluation["stability"]["mean"]  # type: ignore[index]
    assert stability["same_by_chance"] < stability["same_slots"] <= 1
