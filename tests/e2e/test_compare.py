"""``moe-train compare`` as a user runs it: small arms, stopped in the middle, gone on with."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import VOCAB, command, environment, moe_train

STEPS = 40


def experiment(folder: Path, data: Path) -> Path:
    content = {
        "base": "tiny",
        "seeds": [1, 2],
        "budget": {"steps": STEPS},
        "overrides": {
            "data": {
                "train": str(data / "train"),
                "validation": str(data / "validation"),
                "sequence_length": 32,
            },
            "model.vocab_size": VOCAB,
            "eval.every": 0,
        },
        "evaluation": {"limit_batches": 4},
        "arms": {"plain": {}, "free": {"parts.router": "dynamic_k_free"}},
    }
    path = folder / "two.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def table(out: Path) -> dict[str, Any]:
    """Without what depends on the clock, the command line and where a stop cut an interval in two."""
    found: dict[str, Any] = json.loads((out / "table.json").read_text())
    for key in ("date", "command", "curves"):
        del found[key]
    for arm in found["arms"]:
        del arm["metrics"]["tokens_per_second"]
        if arm["difference_to_baseline"]:
            del arm["difference_to_baseline"]["tokens_per_second"]
    return found


@pytest.mark.slow
def test_one_arm(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["compare", experiment(tmp_path, data), "--out", out, "--only", "free", "--seeds", "3"]
    result = moe_train(*arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "| free | 1 |" in result.stdout and "table.md" in result.stderr
    found = table(out)["arms"][1]
    assert found["seeds"] == [3] and found["steps"] == STEPS
    assert 1 <= found["metrics"]["mean_k"]["mean"] <= 8
    assert (out / "report.html").is_file() and (out / "experiment.yaml").is_file()

    again = moe_train(*arguments, timeout=120)
    assert again.returncode == 0 and "finished before" in again.stderr and "step" not in again.stdout.split("|")[0]
    other = moe_train(*arguments, "--steps", 5)
    assert other.returncode == 2 and f"train.steps was {STEPS}, is 5" in other.stderr


def test_data_of_the_evaluation_that_is_not_there_ends_it_at_once(data: Path, tmp_path: Path) -> None:
    path = experiment(tmp_path, data)
    content = yaml.safe_load(path.read_text())
    content["evaluation"] = {"data": str(data / "c4"), "documents": True}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    result = moe_train("compare", path, "--out", tmp_path / "out", timeout=120)
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert f"evaluation.data = {data / 'c4'}: there is no data set" in result.stderr
    assert "moe-train prepare TEXT --output" in result.stderr


@pytest.mark.slow
def test_stopped_and_gone_on_with_is_the_same_table(data: Path, tmp_path: Path) -> None:
    path = experiment(tmp_path, data)
    result = moe_train("compare", path, "--out", tmp_path / "whole")
    assert result.returncode == 0, result.stderr[-3000:]

    arguments = ["compare", path, "--out", tmp_path / "stopped"]
    process = subprocess.Popen(
        command(*arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(tmp_path / "stopped" / "free" / "seed_1" / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output[-3000:]
    assert "the same command goes on" in output
    assert not (tmp_path / "stopped" / "plain" / "seed_2").exists()

    result = moe_train(*arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "plain, seed 1: finished before" in result.stderr
    assert table(tmp_path / "stopped") == table(tmp_path / "whole")
    metrics = tmp_path / "stopped" / "free" / "seed_1" / "metrics.jsonl"
    stopped_at = json.loads((metrics.parent / "environment.json").read_text())["after_step"]
    assert stopped_at > 0 and stopped_at in [json.loads(line)["step"] for line in metrics.read_text().splitlines()]


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"nothing in {path}, exit code {process.poll()}")
