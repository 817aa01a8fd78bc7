"""Checkpoints that are written while training goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.checkpoint.verify import damages
from tests.distributed.harness import background, checkpointing
from tests.distributed.harness.expected import Processes
from tests.distributed.test_checkpoint import CASE, assert_same, same


@pytest.mark.parametrize(("size", "zero"), [(1, 1), (2, 2), pytest.param(4, 3, marks=pytest.mark.slow)])
def test_it_holds_the_moment_of_the_save(processes: Processes, tmp_path: Path, size: int, zero: int) -> None:
    """Parameters, moments and gate state of step 1, though two steps were taken before a byte was written; and the run
    goes on as one that saves nothing."""
    case = CASE.with_(expert=min(size, 2), zero=zero)
    pool = processes(size)
    wanted, end, polled = pool.run(background.train_while_it_writes, case=case, root=str(tmp_path))[0]
    name = "step_00000001"
    assert polled == ([None, None, name, None, None] if size == 1 else [None, None, None, name, None])
    directory = tmp_path / name
    assert list(damages(directory)) == []
    loaded, after, _ = pool.run(checkpointing.resume, case=case, directory=str(directory), until=3)[0]
    assert_same(loaded, wanted)
    assert_same(after, end)
    alone = pool.run(checkpointing.train_and_save, case=case, root=str(tmp_path), saves=[], until=3)[0]
    assert same(end.weights, alone.weights)


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_save_that_fails_is_told_and_hurts_nothing(processes: Processes, tmp_path: Path, failing_rank: int) -> None:
    case = CASE.with_(expert=2)
    for raised, there, names in processes(2).run(
        background.fail_once, case=case, root=str(tmp_path), failing_rank=failing_rank
    ):
        assert "step_00000002 could not be saved" in raised and "No space left" in raised
        assert there == [str(tmp_path / "step_00000001")]
        assert names == ["step_00000001", None, "step_00000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001", "step_00000003"]
    assert not [line for step in (1, 3) for line in damages(tmp_path / f"step_{step:08d}")]


def test_nodes_that_share_no_disk_are_told(processes: Processes, tmp_path: Path) -> None:
    """Pitfall 32 for checkpoints: M#907 (files of one node that another does not see)."""
    for message in processes(2).run(background.blind_rank, case=CASE.with_(expert=2), root=str(tmp_path)):
        assert "cannot see what rank 0 writes" in message and "--run-dir" in message


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_disks_are_looked_at_before_training(
    processes: Processes, tmp_path: Path, on_error: str, is_shared: bool
) -> None:
    found = processes(2).run(background.disks_of_two_nodes, root=str(tmp_path), on_error=on_error, is_shared=is_shared)
    for rank, (raised, printed, left) in enumerate(found):
        assert left == []
        wrong = not is_shared
        assert ("cannot see what rank 0 writes" in raised) == (wrong and on_error == "stop")
        assert ("will save nothing" in printed) == (wrong and on_error == "continue" and rank == 0)


def test_what_a_run_saves_when_one_save_fails(processes: Processes, tmp_path: Path) -> None:
    """``on_error: continue``: told with its step, the others are there; the best weights follow the validation."""
    records, there, raised = processes(1).run(
        background.checkpoints_of_a_run, case=CASE, root=str(tmp_path), on_error="continue"
    )[0]
    assert raised == "" and [record["step"] for record in records] == [1, 1, 2, 3, 3, 3]
    assert [record.get("name") for record in records] == [
        *("step_00000001", "weights_00000001", None, "step_00000003", "weights_00000003", "weights_00000003")
    ]
    assert "No space left" in records[2]["error"]
    assert there == ["best", "latest", "step_00000003", "weights_00000003"]
    assert not [line for name in there[2:] for line in damages(tmp_path / name)]


def test_a_run_that_is_to_stop_where_a_save_fails(processes: Processes, tmp_path: Path) -> None:
    _, there, raised = processes(1).run(
        background.checkpoints_of_a_run, case=CASE, root=str(tmp_path), on_error="stop"
    )[0]
    assert "step_00000002 could not be saved" in raised and "step_00000001" in there
