"""Wrong input ends with one clear message and code 2, and nothing that was saved is lost. One process, no launcher."""

from __future__ import annotations

import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.checkpoints import latest, tensors
from tests.e2e.conftest import command, environment, overrides, write_tokens


def train(run: Path, *arguments: str, before: object = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        command("train", "tiny", *arguments, "--launcher", "none", "--run-dir", run),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
        preexec_fn=before,
    )


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, (result.returncode, result.stdout[-500:], result.stderr[-2000:])
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def test_missing_data(tmp_path: Path) -> None:
    refused(train(tmp_path / "run", *overrides(tmp_path / "nowhere")), "nowhere/train")


def test_truncated_bin(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train", 2000, seed=1)
    write_tokens(tmp_path / "validation", 500, seed=2)
    path = tmp_path / "train.bin"
    path.write_bytes(path.read_bytes()[:-100])
    refused(train(tmp_path / "run", *overrides(tmp_path)), "train.bin", "bytes")


def test_truncated_idx(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train", 2000, seed=1)
    write_tokens(tmp_path / "validation", 500, seed=2)
    path = tmp_path / "train.idx"
    path.write_bytes(path.read_bytes()[:-9])
    refused(train(tmp_path / "run", *overrides(tmp_path)), "train.idx")


def test_unknown_gate(data: Path, tmp_path: Path) -> None:
    refused(train(tmp_path / "run", *overrides(data, "router.gate=softmax_topkk")), "router.gate", "softmax_topk")


def test_tokenizer_larger_than_the_vocabulary(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train", 2000, seed=1)
    write_tokens(tmp_path / "validation", 500, seed=2)
    np.save(tmp_path / "train.token_bytes.npy", np.ones(300, np.int32))
    refused(train(tmp_path / "run", *overrides(tmp_path)), "model.vocab_size", "300")


def test_token_beyond_the_vocabulary_without_a_table(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train", 2000, seed=1, vocab=500)
    write_tokens(tmp_path / "validation", 500, seed=2)
    refused(train(tmp_path / "run", *overrides(tmp_path)), "model.vocab_size")


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    result = train(run, *overrides(data, "train.steps=2", "eval.every=0"))
    assert result.returncode == 0, result.stderr[-2000:]
    return run


def test_checkpoint_of_another_geometry(trained: Path, data: Path, tmp_path: Path) -> None:
    other = overrides(data, "train.steps=4", "eval.every=0", "model.moe.num_experts=4")
    result = train(tmp_path / "run", *other, "--resume", str(latest(trained)))
    refused(result, "of another model", "experts.weight1")


def test_full_disk_while_saving(trained: Path, data: Path, tmp_path: Path) -> None:
    """No file may grow beyond 100 kB: the weights do not fit, the metrics do."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = tensors(latest(run))
    limit = 100_000

    def no_space() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    arguments = overrides(data, "train.steps=4", "eval.every=0")
    result = train(run, *arguments, "--resume", "auto", before=no_space)
    refused(result, "could not be saved", "untouched")
    assert latest(run).name == "step_00000002"
    assert all((before[key] == value).all() for key, value in tensors(latest(run)).items())
    # With space again the run goes on and cleans up.
    result = train(run, *arguments, "--resume", "auto")
    assert result.returncode == 0, result.stderr[-2000:]
    assert not list((run / "checkpoints").glob("*.saving"))
    assert latest(run).name == "step_00000004"
