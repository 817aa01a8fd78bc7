"""Wrong input ends with one clear message and code 2, and nothing that was saved is lost.

A process of the pool runs each command line: forked from a server that has imported everything already.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.data.indexed import IndexedWriter
from tests.e2e.checkpoints import latest, tensors
from tests.e2e.conftest import overrides, write_tokens


@dataclass(frozen=True)
class Result:
    code: int
    stdout: str
    stderr: str


Train = Callable[..., Result]


def run_command_line(arguments: list[str], file_bytes: int | None) -> Result:
    """Runs on a process of the pool. ``file_bytes``: no file may grow beyond this, as if the disk were full."""
    from moe_train.cli import main

    out, err = io.StringIO(), io.StringIO()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(arguments)
            except SystemExit as end:
                code = int(end.code or 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def train(processes: Any) -> Train:
    """``train(run, *arguments, file_bytes=None)``: moe-train train in one process."""

    def call(run: Path, *arguments: str, file_bytes: int | None = None) -> Result:
        line = ["train", "tiny", *arguments, "--launcher", "none", "--run-dir", str(run)]
        (result,) = processes(1).run(run_command_line, arguments=line, file_bytes=file_bytes)
        # Each training leaves groups of gloo behind, whose threads poll; a real one's process ends.
        processes(1).close()
        return result

    return call


def refused(result: Result, *words: str) -> None:
    assert result.code == 2, result
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def test_missing_data(train: Train, tmp_path: Path) -> None:
    refused(train(tmp_path / "run", *overrides(tmp_path / "nowhere")), "nowhere/train")


def test_truncated_bin(train: Train, tmp_path: Path) -> None:
    write_tokens(tmp_path / "train", 2000, seed=1)
    write_tokens(tmp_path / "validation", 500, seed=2)
    path = tmp_path / "train.bin"
    path.write_bytes(path.read_bytes()[:-100])
    refused(train(tmp_path / "run", *overrides(tmp_path)), "train.bin", "bytes")


def test_truncated_idx(train: Train, tmp_path: Path) -> None:
    write_tokens(tmp_path / "train", 2000, seed=1)
    write_tokens(tmp_path / "validation", 500, seed=2)
    path = tmp_path / "train.idx"
    path.write_bytes(path.read_bytes()[:-9])
    refused(train(tmp_path / "run", *overrides(tmp_path)), "train.idx")


def test_unknown_gate(train: Train, data: Path, tmp_path: Path) -> None:
    refused(train(tmp_path / "run", *overrides(data, "router.gate=softmax_topkk")), "router.gate", "softmax_topk")


def test_tokenizer_larger_than_the_vocabulary(train: Train, tmp_path: Path) -> None:
    write_tokens(tmp_path / "train", 2000, seed=1)
    write_tokens(tmp_path / "validation", 500, seed=2)
    np.save(tmp_path / "train.token_bytes.npy", np.ones(300, np.int32))
    refused(train(tmp_path / "run", *overrides(tmp_path)), "model.vocab_size", "300")


def test_token_beyond_the_vocabulary_without_a_table(train: Train, tmp_path: Path) -> None:
    write_tokens(tmp_path / "train", 2000, seed=1, vocab=500)
    write_tokens(tmp_path / "validation", 500, seed=2)
    refused(train(tmp_path / "run", *overrides(tmp_path)), "model.vocab_size")


def test_validation_token_beyond_the_vocabulary_without_a_table(train: Train, tmp_path: Path) -> None:
    write_tokens(tmp_path / "train", 2000, seed=1)
    write_tokens(tmp_path / "validation", 500, seed=2, vocab=500)
    refused(train(tmp_path / "run", *overrides(tmp_path, "eval.every=1")), "validation", "model.vocab_size")


@pytest.mark.parametrize("damage", ["truncated", "tiny", "ids"])
def test_validation_data_is_looked_at_before_the_first_step(train: Train, tmp_path: Path, damage: str) -> None:
    """Not at the first evaluation, which may be hours away."""
    write_tokens(tmp_path / "train", 2000, seed=1)
    write_tokens(tmp_path / "validation", 500, seed=2, vocab=500 if damage == "ids" else 256)
    if damage == "truncated":
        path = tmp_path / "validation.bin"
        path.write_bytes(path.read_bytes()[:-100])
    if damage == "tiny":
        with IndexedWriter(tmp_path / "validation", 256) as writer:
            writer.add(np.array([1]))
    words = {"truncated": ["validation.bin"], "tiny": ["too small"], "ids": ["model.vocab_size"]}[damage]
    result = train(tmp_path / "run", *overrides(tmp_path, "eval.every=5", "train.steps=5"))
    refused(result, "validation", *words)
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and "step 1" not in result.stdout


def test_damaged_token_bytes(train: Train, tmp_path: Path) -> None:
    write_tokens(tmp_path / "train", 2000, seed=1)
    write_tokens(tmp_path / "validation", 500, seed=2)
    (tmp_path / "train.token_bytes.npy").write_bytes(b"")
    refused(train(tmp_path / "run", *overrides(tmp_path)), "train.token_bytes.npy", "damaged")


def test_after_a_failed_start_the_right_command_works(train: Train, tmp_path: Path) -> None:
    """What never took a step is no run that would have to be gone on with."""
    write_tokens(tmp_path / "train", 2000, seed=1)
    write_tokens(tmp_path / "validation", 500, seed=2)
    whole = (tmp_path / "train.bin").read_bytes()
    (tmp_path / "train.bin").write_bytes(whole[:-100])
    arguments = overrides(tmp_path, "train.steps=1", "eval.every=0")
    refused(train(tmp_path / "run", *arguments), "train.bin")
    (tmp_path / "train.bin").write_bytes(whole)
    result = train(tmp_path / "run", *arguments)
    assert result.code == 0, result.stderr[-2000:]


@pytest.fixture(scope="module")
def trained(train: Train, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    result = train(run, *overrides(data, "train.steps=2", "eval.every=0"))
    assert result.code == 0, result.stderr[-2000:]
    return run


def test_checkpoint_of_another_geometry(train: Train, trained: Path, data: Path, tmp_path: Path) -> None:
    other = overrides(data, "train.steps=4", "eval.every=0", "model.moe.num_experts=4")
    result = train(tmp_path / "run", *other, "--resume", str(latest(trained)))
    refused(result, "of another model", "experts.weight1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["model.moe.num_experts=4"], ["of another model"]),
        # The same tensors, but they would compute something else from here on.
        (["model.rope_theta=500"], ["model.rope_theta: 10000.0 there, 500.0 now", "config.yaml in the folder"]),
        (["data.sequence_length=16"], ["sequence_length: 32 then, 16 now"]),
        (["seed=9"], ["seed: 1 then, 9 now"]),
        (["data.train={data}/validation"], ["data sets left out: train; data sets added: validation"]),
    ],
)
def test_going_on_with_something_else(
    train: Train, trained: Path, data: Path, tmp_path: Path, change: list[str], words: list[str]
) -> None:
    """Refused, and the run's own configuration stays the one in its folder."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = (run / "config.yaml").read_text()
    change = [option.format(data=data) for option in change]
    refused(train(run, *overrides(data, "train.steps=4", "eval.every=0", *change), "--resume", "auto"), *words)
    assert (run / "config.yaml").read_text() == before


def test_a_run_that_began_with_another_ones_checkpoint(train: Train, trained: Path, data: Path, tmp_path: Path) -> None:
    """As long as it has saved nothing itself, going on means beginning there again, not with random weights."""
    run = tmp_path / "run"
    arguments = overrides(data, "train.steps=3", "eval.every=0", "logging.every=1")
    for resume in (str(latest(trained)), "auto"):
        result = train(run, *arguments, "--resume", resume)
        assert result.code == 0, result.stderr[-2000:]
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records if record["kind"] == "train"] == [3]
        shutil.rmtree(run / "checkpoints")


def test_inspect_shows_run_and_checkpoint(processes: Any, trained: Path) -> None:
    (result,) = processes(1).run(run_command_line, arguments=["inspect", str(trained)], file_bytes=None)
    assert result.code == 0, result.stderr
    assert "step_00000002 (latest)" in result.stdout
    assert "decoder.layers.1.mlp.experts.weight1 [8, 64, 64]" in result.stdout
    assert "step 2, 256 tokens" in result.stdout


def test_full_disk_while_saving(train: Train, trained: Path, data: Path, tmp_path: Path) -> None:
    """No file may grow beyond 100 kB: the weights do not fit, the metrics do."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = tensors(latest(run))
    arguments = overrides(data, "train.steps=4", "eval.every=0")
    result = train(run, *arguments, "--resume", "auto", file_bytes=100_000)
    refused(result, "could not be saved", "untouched")
    assert latest(run).name == "step_00000002"
    assert all((before[key] == value).all() for key, value in tensors(latest(run)).items())
    # With space again the run goes on and cleans up.
    result = train(run, *arguments, "--resume", "auto")
    assert result.code == 0, result.stderr[-2000:]
    assert not list((run / "checkpoints").glob("*.saving"))
    assert latest(run).name == "step_00000004"
