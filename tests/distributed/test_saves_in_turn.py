"""What is on disk after several saves: nothing that a pointer names goes, whatever clocks and old files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.checkpoint import store
from moe_train.checkpoint.state import read_state
from moe_train.checkpoint.verify import damages
from tests.distributed.harness.expected import Processes
from tests.distributed.harness.saves import Save, save_in_turn


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def saved(processes: Processes, root: Path, *saves: Save, keep: int = 2) -> list[str]:
    raised: list[str] = processes(1).run(save_in_turn, root=str(root), saves=list(saves), keep=keep)[0]
    return raised


def test_a_clock_that_goes_back(processes: Processes, tmp_path: Path) -> None:
    """A host with another clock after a restart: what it saves is newer all the same."""
    saved(processes, tmp_path, Save(100, 5000.0), Save(200, 5060.0))
    saved(processes, tmp_path, Save(300, 4000.0), Save(400, 4060.0), Save(400, 4120.0, best=True))
    assert names(tmp_path) == ["best", "latest", "step_00000300", "step_00000400", "weights_00000400"]
    assert (tmp_path / "latest").read_text() == "step_00000400"


def test_what_latest_names_stays(processes: Processes, tmp_path: Path) -> None:
    """A run that goes on from an earlier checkpoint: `latest` names that until the first save."""
    saved(processes, tmp_path, *(Save(step, float(step)) for step in (1, 2, 3)), keep=3)
    store.point(tmp_path / "step_00000001", store.LATEST)
    saved(processes, tmp_path, Save(1, 10.0, best=True), keep=1)
    assert names(tmp_path) == ["best", "latest", "step_00000001", "step_00000003", "weights_00000001"]


@pytest.mark.parametrize("pointer", [store.LATEST, store.BEST])
def test_a_pointer_to_nothing_does_not_keep_a_run_from_saving(
    processes: Processes, tmp_path: Path, pointer: str
) -> None:
    (tmp_path / pointer).write_text("step_00000099")
    assert saved(processes, tmp_path, Save(1, 1.0), Save(1, 2.0, best=True)) == ["", ""]
    assert (tmp_path / pointer).read_text() in ("step_00000001", "weights_00000001")


def test_old_checkpoints_that_cannot_be_read_are_left_alone(processes: Processes, tmp_path: Path) -> None:
    saved(processes, tmp_path, Save(1, 1.0), Save(2, 2.0))
    path = tmp_path / "step_00000001" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    assert saved(processes, tmp_path, Save(3, 3.0), Save(4, 4.0), keep=1) == ["", ""]
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000004"]
    assert list(damages(tmp_path / "step_00000004")) == []


def test_weights_of_the_end_that_are_the_best_too_stay(processes: Processes, tmp_path: Path) -> None:
    saved(processes, tmp_path, Save(5, 1.0, final=True), Save(5, 2.0, best=True), Save(9, 3.0, best=True))
    assert names(tmp_path) == ["best", "weights_00000005", "weights_00000009"]
    assert read_state(tmp_path / "weights_00000005")["final"] is True


def test_weights_that_cannot_be_read_stay(processes: Processes, tmp_path: Path) -> None:
    """They may be those of the end; so may those that take their place."""
    saved(processes, tmp_path, Save(5, 1.0, final=True, best=True), Save(7, 2.0, best=True))
    for step in (5, 7):
        (tmp_path / f"weights_0000000{step}" / "state.json").write_text('{"format": 1}')
    assert saved(processes, tmp_path, Save(5, 3.0, best=True), Save(9, 4.0, best=True)) == ["", ""]
    assert names(tmp_path) == ["best", "weights_00000005", "weights_00000007", "weights_00000009"]
    assert read_state(tmp_path / "weights_00000005")["final"] is True
