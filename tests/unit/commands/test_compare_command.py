"""``moe-train compare``: what is refused before anything starts, and --dry-run."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train import cli
from moe_train.commands import compare as command
from moe_train.lab import compare as lab
from moe_train.lab.plan import PlannedRun
from tests.unit.lab.experiments import FakeRunner, write


@pytest.fixture(autouse=True)
def _processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)


def test_dry_run_prints_and_starts_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["compare", "dynamic_k_table_small", "--only", "top_2", "--seeds", "4,5", "--dry-run"]) == 0
    text = capsys.readouterr().out
    for part in ("1 arms, seeds 4, 5, 2 runs", "top_2", "2,754,176", "500", "1,024,000", "data/demo/validation"):
        assert part in text
    assert "tau_0.50" not in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["lpr_tabel"], "Did you mean lpr_table"),
        (["two.yaml", "--only", "nothing"], "no such arm"),
        (["two.yaml", "train.stps=3"], "did you mean train.steps?"),
        (["two.yaml", "train.steps=3"], "it follows from budget"),
        (["two.yaml", "--processes", "3"], "data-parallel ranks (3)"),
        (["two.yaml", "data.train=nowhere", "data.validation=nowhere"], "there is no data set nowhere"),
    ],
)
def test_wrong_input(capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], text: str) -> None:
    write(tmp_path / "two.yaml")
    assert cli.main(["compare", *arguments]) == 2
    assert text in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["two.yaml"]


@pytest.mark.parametrize(
    "arguments", [["--seeds", "1,x"], ["--seeds", "-1"], ["--steps", "0"], ["--steps", "1", "--tokens", "1"]]
)
def test_wrong_options(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["compare", "lpr_table", *arguments])


def test_train_names_the_command_for_a_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "lpr_table_small"]) == 2
    assert "moe-train compare lpr_table_small" in capsys.readouterr().err


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped, failed, done: with a runner that starts nothing, and data that is not looked for."""
    codes = [130]
    runner = FakeRunner(codes)
    made: list[str] = []
    monkeypatch.setattr(lab, "check_all_data", lambda runs: None)
    monkeypatch.setattr(lab.demo_data, "make", lambda say: made.append("data") or 0)
    monkeypatch.setattr("moe_train.lab.runner.LaunchRunner", lambda processes, accelerators: runner)
    monkeypatch.setattr("moe_train.lab.writing.page", lambda table, curves: "")
    write(tmp_path / "two.yaml")
    line = ["compare", "two.yaml", "--out", "out"]
    assert cli.main(line) == 130
    assert "interrupted; what is saved stays, and the same command goes on" in capsys.readouterr().err
    assert made == ["data"]
    codes.extend([143])
    assert cli.main(line) == 143
    codes.extend([1])
    assert cli.main(line) == 1
    captured = capsys.readouterr()
    assert "| plain | 1 |" in captured.out and "FAILED: plain, seed 1" in captured.err
    assert cli.main(line) == 0
    assert "| plain | 2 |" in capsys.readouterr().out
    assert cli.main(line) == 0 and len(made) == 4, "what is finished needs no data"


def test_every_run_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(FakeRunner):
        def train(self, run: PlannedRun) -> int:
            return 1

    monkeypatch.setattr(lab, "check_all_data", lambda runs: None)
    monkeypatch.setattr(lab.demo_data, "make", lambda say: 0)
    monkeypatch.setattr("moe_train.lab.runner.LaunchRunner", lambda processes, accelerators: Broken())
    write(tmp_path / "two.yaml")
    assert cli.main(["compare", "two.yaml"]) == 1
    assert "no run is finished: plain, seed 1" in capsys.readouterr().err


def test_a_credential_in_the_command_line_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["moe-train", "compare", "x", "api_key=abc"])
    assert command.command_line() == "moe-train compare x 'api_key=***'"
