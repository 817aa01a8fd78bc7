"""A run through the deepspeed launcher with experts over two processes: train, stop, resume, evaluate, report."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.e2e.checkpoints import latest, records, tensors
from tests.e2e.conftest import command, environment, moe_train, overrides

STEPS = 30
SECRET = "hf_" + "Zq7" * 9
"""In the environment of the run as a token would be."""


def experiment(data: Path) -> list[str]:
    """EP 2, accumulation 2, recomputation, ZeRO 2, a selection bias: everything that has state."""
    return overrides(
        data,
        "parallel.expert=2",
        f"train.steps={STEPS}",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "train.zero_stage=2",
        "train.recompute=true",
        "router.balancing.bias.rate=0.01",
        "checkpoint.every_steps=10",
        "eval.every=15",
        "schedule.kind=cosine",
    )


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run."""
    run = tmp_path_factory.mktemp("finished") / "run"
    secret = {name: SECRET for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_OWN")}
    result = moe_train("train", "tiny", *experiment(data), "--processes", 2, "--run-dir", run, env=secret)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"step {STEPS}/{STEPS}" in result.stdout
    assert SECRET not in result.stdout + result.stderr
    return run


def test_environment_variables_are_not_written_into_the_run_folder(finished: Path) -> None:
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_run_folder(finished: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "environment.json", "tensorboard"):
        assert (finished / name).exists(), name
    train = [r for r in records(finished) if r["kind"] == "train"]
    assert [r["step"] for r in train] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records(finished) if r["kind"] == "eval"] == [15, 30]
    for record in train:
        needed = {"tokens", "loss", "lr", "grad_norm", "tokens_per_second", "step_seconds", "memory_bytes", "load"}
        assert needed <= record.keys()
        # 8 sequences of 32 tokens, 2 experts each, all counted once, on both ranks together.
        assert [sum(layer) for layer in record["load"]] == [8 * 32 * 2] * 2
    assert train[-1]["tokens"] == STEPS * 8 * 32
    assert train[-1]["loss"] < train[0]["loss"] - 0.2
    assert abs(train[0]["loss"] - math.log(256)) < 0.3
    kept = sorted(path.name for path in (finished / "checkpoints").glob("step_*"))
    assert kept == ["step_00000020", "step_00000030"]


def test_stopped_and_resumed_run_is_the_same_run_bit_for_bit(finished: Path, data: Path, tmp_path: Path) -> None:
    """Invariant 8; also that SIGTERM saves a checkpoint and that its records are not written twice."""
    run = tmp_path / "run"
    arguments = ["train", "tiny", *experiment(data), "--processes", 2, "--run-dir", run, "--resume", "auto"]
    process = subprocess.Popen(command(*arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for_step(run, 3, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, output.decode()[-3000:]
    stopped_at = int(latest(run).name.removeprefix("step_"))
    assert 3 <= stopped_at < STEPS, "the run was not stopped in its middle"

    result = moe_train(*arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"after step {stopped_at}" in result.stdout
    assert [r["step"] for r in records(run) if r["kind"] == "train"] == list(range(1, STEPS + 1))
    expected, got = tensors(latest(finished)), tensors(latest(run))
    assert expected.keys() == got.keys()
    assert any(key.startswith("exp_avg_sq.") and ".experts." in key for key in got)
    assert any(key.endswith("bias_E") and got[key].abs().max() > 0 for key in got)
    for key, value in expected.items():
        assert torch.equal(value, got[key]), f"{key} differs after the resume"
    losses = [[r["loss"] for r in records(folder) if r["kind"] == "train"] for folder in (finished, run)]
    assert losses[0] == losses[1]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} within {seconds:g} s, exit code {process.poll()}")


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run(data: Path, tmp_path: Path) -> None:
    """Within a bounded time, with a message and a code, and what was saved stays."""
    import psutil

    run = tmp_path / "run"
    arguments = [*experiment(data), "train.steps=100000", "checkpoint.every_steps=5", "eval.every=0"]
    process = subprocess.Popen(
        command("train", "tiny", *arguments, "--processes", 2, "--run-dir", run),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_for_step(run, 7, process)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "moe_train.training" in p.cmdline()]
    workers = [p for p in workers if not any("launch" in word for word in p.cmdline()[:4])]
    start = time.monotonic()
    workers[-1].kill()
    output, _ = process.communicate(timeout=300)
    assert time.monotonic() - start < 200
    assert process.returncode not in (0, None)
    assert "died without a word" in output.decode() and "--resume auto" in output.decode()
    assert tensors(latest(run))
    for worker in workers:
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_evaluation_is_the_same_under_every_layout_and_report(finished: Path, tmp_path: Path) -> None:
    """Weights saved by EP 2 under ZeRO 2 load in one process too; an uneven last batch changes nothing."""
    import json

    results = []
    for processes in (2, 1):
        path = tmp_path / f"{processes}.json"
        result = moe_train("evaluate", finished, "--processes", processes, "--json", path)
        assert result.returncode == 0, result.stderr[-3000:]
        results.append(json.loads(path.read_text()))
    assert results[0]["tokens"] == results[1]["tokens"]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-6)
    assert [layer["load"] for layer in results[0]["layers"]] == [layer["load"] for layer in results[1]["layers"]]
    last = [r for r in records(finished) if r["kind"] == "eval"][-1]
    assert abs(last["eval/loss"] - results[0]["loss"]) < 0.5  # a part of the same data
    path = tmp_path / "documents.json"
    result = moe_train("evaluate", finished, "--documents", "--max-length", 24, "--json", path)
    assert result.returncode == 0, result.stderr[-3000:]
    documents = json.loads(path.read_text())["documents"]
    assert documents["documents"] > 0 and documents["max_length"] == 24
    assert abs(documents["loss_batch_average"] - results[0]["loss"]) < 1.0
    result = moe_train("report", finished)
    assert result.returncode == 0, result.stderr[-3000:]
    html = (finished / "report.html").read_text()
    assert "<svg" in html or "data:image" in html
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?\s*(?:https?:)?//""", html), "the report needs a network"


def test_an_existing_run_is_not_overwritten(finished: Path, data: Path) -> None:
    result = moe_train("train", "tiny", *experiment(data), "--processes", 2, "--run-dir", finished)
    assert result.returncode == 2
    assert "--resume auto" in result.stderr
