"""What a model came with stays with the runs that go on from its runs."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

from tests.e2e.checkpoints import latest
from tests.e2e.conftest import overrides


def train(run: Path, resume: str | None, arguments: list[str]) -> None:
    """On a process of a pool."""
    from moe_train.training import trainer
    from moe_train.training.run_config import load_run_config
    from moe_train.training.stop import StopRequest

    with contextlib.redirect_stdout(io.StringIO()):
        assert trainer.train(load_run_config("tiny", arguments), run, resume, StopRequest())


def test_a_run_that_goes_on_from_another_one_carries_it(processes: Any, data: Path, tmp_path: Path) -> None:
    """Into another folder; in the run's own nothing changes. Without it an export would lack tokenizer and settings."""

    def go_on(name: str, resume: Path | str, steps: int) -> Path:
        run = tmp_path / name
        arguments = overrides(data, f"train.steps={steps}", "eval.every=0")
        processes(1).run(train, run=run, resume=str(resume), arguments=arguments)
        processes(1).close()  # each training leaves groups of gloo behind
        return run

    first = go_on("first", "auto", 1)
    assert not (first / "hf").exists()
    (first / "hf").mkdir()
    contents = {"hf/config.json": '{"eos_token_id": 3}', "hf/LICENSE": "free", "tokenizer.json": "{}"}
    for name, content in contents.items():
        (first / name).write_text(content)
    (first / "hf" / "origin.json").write_text(json.dumps({"from": "models/hub", "tokenizer": ["tokenizer.json"]}))

    second = go_on("second", latest(first), 2)
    assert {name: (second / name).read_text() for name in contents} == contents
    origin = json.loads((second / "hf" / "origin.json").read_text())
    assert origin == {"from": str(first), "tokenizer": ["tokenizer.json"]}

    # Its own checkpoint is no other run's.
    go_on("second", latest(second), 3)
    assert json.loads((second / "hf" / "origin.json").read_text()) == origin
    # Begun again before it had saved anything, from a run that came with nothing.
    for name in ("checkpoints", "metrics.jsonl"):
        path = second / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(first / "hf")
    go_on("second", latest(first), 2)
    assert not (second / "hf").exists() and not (second / "tokenizer.json").exists()
