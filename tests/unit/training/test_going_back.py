"""Back to an earlier checkpoint of a run: what `latest` names while that is loaded, and after."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from moe_train.checkpoint.state import state_bytes
from moe_train.training import trainer
from moe_train.training.going_back import going_back
from moe_train.training.run_config import load_run_config
from moe_train.training.stop import StopRequest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the checkpoints of a run that has got to step 150."""
    root = tmp_path / "checkpoints"
    for name, more in (("step_00000100", {}), ("step_00000150", {}), ("weights_00000100", {"weights_only": True})):
        (root / name).mkdir(parents=True)
        state: dict[str, Any] = {"step": 100, "config": {}, **more}
        (root / name / "state.json").write_bytes(state_bytes(state, b""))
    (root / "latest").write_text("step_00000150")
    return root


def named_after(folder: Path, resume: str | None, error: BaseException | None = None) -> str:
    """What `latest` names when a start has ended so."""
    try:
        with going_back(folder.parent, resume):
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    return (folder / "latest").read_text() if (folder / "latest").exists() else ""


@pytest.mark.parametrize(
    "error", [None, RuntimeError("out of memory"), KeyboardInterrupt(), OSError(errno.ESTALE, "Stale file handle")]
)
def test_it_is_the_latest_however_the_start_dies(folder: Path, error: BaseException | None) -> None:
    assert named_after(folder, str(folder / "step_00000100"), error) == "step_00000100"


@pytest.mark.parametrize("before", ["step_00000150", ""])
@pytest.mark.parametrize("error", [ValueError("damaged"), FileNotFoundError("no data")])
def test_a_start_that_is_refused_changes_nothing(folder: Path, error: Exception, before: str) -> None:
    (folder / "latest").write_text(before)
    if not before:
        (folder / "latest").unlink()
    assert named_after(folder, str(folder / "step_00000100"), error) == before


def test_only_what_a_run_goes_on_from(folder: Path, tmp_path: Path) -> None:
    (folder / "step_00000120").mkdir()
    (folder / "step_00000120" / "state.json").write_text("{}")
    other = tmp_path / "other" / "checkpoints" / "step_00000100"
    other.mkdir(parents=True)
    (other / "state.json").write_bytes((folder / "step_00000100" / "state.json").read_bytes())
    for resume in (None, "auto", folder / "weights_00000100", folder / "step_00000120", other):
        assert named_after(folder, resume and str(resume)) == "step_00000150"
    assert not (other.parent / "latest").exists()


def test_a_disk_that_is_away_for_a_moment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the checkpoint is looked at: the restart is to try the same one."""
    error = OSError(errno.ESTALE, "Stale file handle")

    def fail(_: Path) -> None:
        raise error

    monkeypatch.setattr("moe_train.training.going_back.read_state_with_config", fail)
    assert named_after(folder, str(folder / "step_00000100"), error) == "step_00000100"


def test_a_first_start_that_dies_while_it_builds_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        assert (folder.parent / ".lock").exists(), "no other run may be at work there"
        raise MemoryError

    monkeypatch.setattr(trainer, "Trainer", die)
    monkeypatch.setattr(trainer, "initialize", lambda _: type("Groups", (), {"world_size": 1, "rank": 0}))
    monkeypatch.setattr(trainer, "check_disk", lambda *_: None)
    with pytest.raises(MemoryError):
        trainer.train(load_run_config("tiny"), folder.parent, str(folder / "step_00000100"), StopRequest())
    assert (folder / "latest").read_text() == "step_00000100", "a restart goes on from there"
