"""``moe-train evaluate`` and ``moe-train report``: arguments, files and what is printed. The worker is a stand-in."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from moe_train.commands import evaluate, report

RESULT = {"step": 3, "data": "data/val", "loss": 2.5, "perplexity": 12.18, "tokens": 9, "layers": [], "mean": {}}


def run_folder(folder: Path, validation: str = "data/val") -> Path:
    (folder / "config.yaml").write_text(json.dumps({"name": "demo", "data": {"validation": validation}}))
    return folder


def call(module: object, *line: str) -> int:
    parser = argparse.ArgumentParser()
    module.register(parser)  # type: ignore[attr-defined]
    return module.run(parser.parse_args(line))  # type: ignore[attr-defined, no-any-return]


class Worker:
    """Takes the place of the launch; writes RESULT unless told to fail."""

    def __init__(self, code: int = 0, write: bool = True, data: str = "data/val") -> None:
        self.code, self.write, self.data = code, write, data
        self.line: list[str] = []
        self.processes: int | None = None

    def __call__(self, module: str, worker: list[str], run_dir: Path, processes: int | None) -> int:
        self.line, self.processes = worker, processes
        if self.write:
            output = Path(worker[worker.index("--output") + 1])
            output.parent.mkdir(exist_ok=True)
            output.write_text(json.dumps(RESULT | {"data": self.data}))
        return self.code


def test_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(evaluate, "launch", worker := Worker())
    copy = tmp_path / "copy.json"
    line = [str(run_folder(tmp_path)), "--processes", "2", "--limit-batches", "5", "--json", str(copy)]
    assert call(evaluate, *line) == 0
    assert worker.processes == 2
    expected = f"--run-dir {tmp_path} --checkpoint latest --limit-batches 5 --output"
    assert worker.line[:-1] == expected.split()
    assert json.loads((tmp_path / "evaluation" / "val.json").read_text()) == RESULT == json.loads(copy.read_text())
    assert [path.name for path in (tmp_path / "evaluation").iterdir()] == ["val.json"]
    assert "2.5000" in capsys.readouterr().out


def test_json_to_the_screen_is_nothing_but_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "launch", Worker())
    assert call(evaluate, str(run_folder(tmp_path)), "--data", "x/other", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == RESULT
    assert (tmp_path / "evaluation" / "other.json").is_file()


def test_documents_have_a_result_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "launch", worker := Worker())
    run = str(run_folder(tmp_path))
    assert call(evaluate, run) == 0
    assert call(evaluate, run, "--documents", "--max-length", "64", "--checkpoint", "7") == 0
    assert "--max-length 64 --documents --output" in " ".join(worker.line) and "--batch-documents" not in worker.line
    names = sorted(path.name for path in (tmp_path / "evaluation").iterdir())
    assert names == ["val-documents-step_00000007.json", "val.json"]
    with pytest.raises(ValueError, match="--max-length is for evaluation of --documents"):
        call(evaluate, run, "--max-length", "64")


def test_a_data_set_of_the_same_last_name_does_not_replace_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are kept, and listed in the report."""
    run = str(run_folder(tmp_path))
    for data in ("data/val", "other/val", "other/val"):
        monkeypatch.setattr(evaluate, "launch", Worker(data=data))
        assert call(evaluate, run, "--data", data) == 0
    found = {path.name: json.loads(path.read_text())["data"] for path in (tmp_path / "evaluation").iterdir()}
    assert found == {"val.json": "data/val", "other-val.json": "other/val"}
    assert "other-val.json" in capsys.readouterr().out
    assert call(report, run) == 0
    html = (tmp_path / "report.html").read_text()
    assert all(cell in html for cell in ("data/val", "other/val", "other-val"))


@pytest.mark.parametrize("worker", [Worker(code=3), Worker(code=0, write=False)])
def test_a_failed_evaluation_keeps_the_earlier_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], worker: Worker
) -> None:
    earlier = tmp_path / "evaluation" / "val.json"
    earlier.parent.mkdir()
    earlier.write_text("earlier")
    monkeypatch.setattr(evaluate, "launch", worker)
    assert call(evaluate, str(run_folder(tmp_path))) == (worker.code or 1)
    assert earlier.read_text() == "earlier"
    assert "did not finish" in capsys.readouterr().err


def test_no_run_folder_or_no_validation_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a run folder"):
        call(evaluate, str(tmp_path))
    with pytest.raises(ValueError, match="--data"):
        call(evaluate, str(run_folder(tmp_path, validation="")))


def test_wrong_numbers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(evaluate, str(tmp_path), "--limit-batches", "0")
    assert "'0' is not a positive whole number" in capsys.readouterr().err


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "there" / "x.html"
    assert call(report, str(run_folder(tmp_path)), "--output", str(output)) == 0
    assert str(output) in capsys.readouterr().out
    assert output.read_text().startswith("<!DOCTYPE html>")
