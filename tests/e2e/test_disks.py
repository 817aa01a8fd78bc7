"""Two nodes without a common disk (pitfall 32: M#907, Megatron-DeepSpeed#356, MB PR5107)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from moe_train.launch.plan import free_port
from tests.e2e.conftest import command, environment, moe_train, overrides

pytestmark = pytest.mark.slow


def settings(data: Path) -> list[str]:
    sizes = ["train.steps=6", "train.global_batch_size=4", "train.micro_batch_size=1", "parallel.expert=2"]
    return overrides(data, *sizes, "logging.every=1", "eval.every=3", "data.sampler=documents")


def two_nodes(folder: Path, data: Path, *more: str) -> list[subprocess.CompletedProcess[str]]:
    """The same command in the folders of two nodes, where relative paths mean different places."""
    port = free_port()
    nodes = []
    for rank in range(2):
        (folder / f"node_{rank}").mkdir(parents=True)
        launch = [
            "--no-ssh",
            "--num-nodes",
            2,
            "--node-rank",
            rank,
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            port,
        ]
        line = command(
            "train",
            "tiny",
            *settings(data),
            "data.index_cache=cache",
            *more,
            *launch,
            "--processes",
            1,
            "--run-dir",
            "run",
        )
        nodes.append(
            subprocess.Popen(
                line,
                cwd=folder / f"node_{rank}",
                env=environment(),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        )
    texts = [node.communicate(timeout=900)[0] for node in nodes]
    return [subprocess.CompletedProcess([], node.returncode, text) for node, text in zip(nodes, texts, strict=True)]


def curve(run: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]


def test_it_is_refused_before_training(data: Path, tmp_path: Path) -> None:
    for rank, node in enumerate(two_nodes(tmp_path, data)):
        assert node.returncode == 2, node.stdout[-3000:]
        assert "cannot see what rank 0 writes" in node.stdout and "--run-dir" in node.stdout
        run = tmp_path / f"node_{rank}" / "run"
        assert not (run / "metrics.jsonl").exists() and not (run / "checkpoints").exists()


def test_it_trains_without_checkpoints_where_that_is_wanted(data: Path, tmp_path: Path) -> None:
    """Each node makes the index of samples for itself; the curve is that of nodes with a common disk."""
    nodes = two_nodes(tmp_path / "apart", data, "checkpoint.on_error=continue")
    assert [node.returncode for node in nodes] == [0, 0], nodes[0].stdout[-3000:]
    assert "This run will save nothing" in nodes[0].stdout
    for rank in range(2):
        assert list((tmp_path / "apart" / f"node_{rank}" / "cache").rglob("*"))
    assert not list((tmp_path / "apart").rglob("latest"))
    run = tmp_path / "one machine"
    result = moe_train("train", "tiny", *settings(data), f"data.index_cache={tmp_path / 'cache'}", "--run-dir", run)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(curve(run)) == 6 and curve(tmp_path / "apart" / "node_0" / "run") == curve(run)
