"""``moe-train train``: what is refused before anything starts, and --dry-run."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train import cli


@pytest.fixture(autouse=True)
def _processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)


def test_dry_run_prints_and_starts_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["train", "demo", "train.steps=70", "--dry-run", "seed=5"]) == 0
    text = capsys.readouterr().out
    for part in ("steps: 70", "seed: 5", "17,467,904", "FLOPs per token", "memory per rank", "on cpu: EP 2"):
        assert part in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["demo", "train.stps=3"], "did you mean train.steps?"),
        (["demo", "--processes", "3"], "use --processes 2"),
        (["demo", "--processes", "0"], "--processes must be at least 1"),
        (["demo", "--launcher", "none"], "use --processes 2"),
        (["demo", "--launcher", "none", "--processes", "2"], "runs one process"),
        (["demo", "--num-nodes", "2"], "--no-ssh"),
        (["demo", "--num-nodes", "2", "--no-ssh"], "--master-addr"),
        (["demo", "--num-nodes", "2", "--no-ssh", "--node-rank", "2", "--master-addr", "x"], "--node-rank"),
        (["demo", "--hostfile", "nowhere"], "no such file"),
        (["nothing"], "Shipped experiments"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_wrong_input(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], text: str, dry: bool
) -> None:
    assert cli.main(["train", *arguments, *(["--dry-run"] if dry else [])]) == 2
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_is_not_overwritten(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "metrics.jsonl").write_text("old")
    assert cli.main(["train", "tiny"]) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "runs" / "tiny").iterdir()] == ["metrics.jsonl"]


def test_two_nodes_count_their_processes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--num-nodes", "2", "--no-ssh", "--master-addr", "10.0.0.1", "--dry-run"]
    assert cli.main(["train", "demo", *arguments]) == 0
    assert "2 processes on cpu" in capsys.readouterr().out


def test_data_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["train", "tiny", "data.train="]) == 2
    assert cli.main(["train", "tiny", "data.train=nowhere/x"]) == 2
    assert "nowhere/x.idx" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
