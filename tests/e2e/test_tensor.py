"""A run under tensor parallelism from the command line; its checkpoints go on, and are used, without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.checkpoints import records
from tests.e2e.conftest import moe_train, overrides

MODEL = [
    "model.num_layers=3",
    "model.dense_layers=[0]",
    "model.ffn_hidden_size=96",
    "model.moe.shared_expert_hidden_size=16",
    "router.balancing.bias.rate=0.01",
]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run) if record["kind"] == "train"]


@pytest.mark.slow
def test_a_run_goes_on_in_one_process(data: Path, tmp_path: Path) -> None:
    arguments = overrides(
        data, *MODEL, "train.steps=6", "train.global_batch_size=4", "train.micro_batch_size=2", "eval.every=3",
        "checkpoint.every_steps=3", "logging.every=1", "train.recompute=true",
    )  # fmt: skip
    divided = [*arguments, "parallel.tensor=2", "parallel.expert=2", "train.zero_stage=2"]
    result = moe_train("train", "tiny", *divided, "--processes", 2, "--run-dir", tmp_path / "divided")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    result = moe_train("train", "tiny", *arguments, "--processes", 1, "--run-dir", tmp_path / "whole")
    assert result.returncode == 0, result.stderr[-3000:]
    want = losses(tmp_path / "whole")
    assert len(want) == 6 and losses(tmp_path / "divided") == pytest.approx(want, rel=1e-4)
    evaluations = {r["step"]: r["eval/loss"] for r in records(tmp_path / "divided") if r["kind"] == "eval"}
    assert set(evaluations) == {3, 6}

    begun = tmp_path / "divided" / "checkpoints" / "step_00000003"
    result = moe_train("train", "tiny", *arguments, "--processes", 1, "--run-dir", tmp_path / "on", "--resume", begun)
    assert result.returncode == 0, result.stderr[-3000:]
    assert losses(tmp_path / "on") == pytest.approx(want[3:], rel=1e-4)

    for command in (["evaluate", tmp_path / "divided"], ["report", tmp_path / "divided"]):
        result = moe_train(*command)
        assert result.returncode == 0, result.stderr[-3000:]
    result = moe_train("inspect", tmp_path / "divided")
    assert result.returncode == 0 and "tensor 2" in result.stdout, result.stdout
