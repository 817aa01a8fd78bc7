"""Which checkpoints there are, and how one is put in place; without processes."""

from __future__ import annotations

import errno
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_train.checkpoint import store
from moe_train.checkpoint.index import check_covered
from moe_train.checkpoint.state import read_state
from moe_train.checkpoint.verify import damages
from moe_train.checkpoint.writing import LazyBox, write_boxes


def write(root: Path, step: int, kind: str = store.STEP, pointers: tuple[str, ...] = (store.LATEST,), **state) -> Path:
    final = store.folder_of(root, step, kind)
    temporary = store.begin(root, final)
    values = torch.full((3,), float(step))
    index = write_boxes(temporary, "__0_", [LazyBox("model.a", (3,), (0,), (3,), torch.float32, lambda: values)])
    check_covered(index)
    store.finish(temporary, index, {"step": step, **state})
    store.put_in_place(final, pointers)
    return final


def test_pointers(tmp_path: Path) -> None:
    assert store.latest(tmp_path) is None
    (tmp_path / "step_00000005").mkdir()
    assert store.latest(tmp_path) is None, "a folder counts only once `latest` names it"
    (tmp_path / "latest").write_text("step_00000005\n")
    assert store.latest(tmp_path) == tmp_path / "step_00000005"
    (tmp_path / "latest").write_text("step_00000006")
    with pytest.raises(ValueError, match="step_00000006, which does not exist.*--resume"):
        store.latest(tmp_path)


def test_a_checkpoint_is_complete_when_it_has_its_name(tmp_path: Path) -> None:
    written = write(tmp_path, 3)
    assert store.latest(tmp_path) == written and store.steps_of(tmp_path) == [3]
    assert read_state(written)["step"] == 3 and list(damages(written)) == []
    write(tmp_path, 7, store.WEIGHTS, (store.BEST,))
    assert store.latest(tmp_path) == written and store.steps_of(tmp_path) == [3]
    assert store.named_by(tmp_path, store.BEST) == tmp_path / "weights_00000007"
    (tmp_path / "step_00000009").mkdir()
    assert store.steps_of(tmp_path) == [3], "a folder without state.json is no checkpoint"


def test_a_save_that_is_cut_off_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prefix of the operations on files leaves a latest checkpoint that verifies, and the next save succeeds."""
    for step, cut_at in ((2, None), *((n % 2 + 2, n) for n in range(40))):
        run_with_operations(tmp_path, step, cut_at, monkeypatch)
        found = store.latest(tmp_path)
        assert found is not None and list(damages(found)) == [], (step, cut_at)
    write(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.glob("*.*")) == []


class Killed(BaseException):
    pass


def run_with_operations(root: Path, step: int, cut_at: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves a step; operation number ``cut_at`` and all after it do not happen."""
    import os
    import shutil

    count = itertools.count()
    with monkeypatch.context() as patch:
        for module, name in ((os, "rename"), (os, "replace"), (os, "unlink"), (os, "fsync"), (shutil, "rmtree")):
            real = getattr(module, name)

            def operation(*args, _real=real, **kwargs):
                if cut_at is not None and next(count) >= cut_at:
                    raise Killed
                return _real(*args, **kwargs)

            patch.setattr(module, name, operation)
        try:
            write(root, step)
        except Killed:
            pass


def test_a_deletion_that_is_cut_off_is_ended_by_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path: None)
        store.remove([old])
    assert store.steps_of(tmp_path) == [] and [path.name for path in tmp_path.glob("step*")] == [
        "step_00000001.removing"
    ]
    write(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000002"]


def busy(*names: str) -> Callable[..., None]:
    """shutil.rmtree where these folders cannot be deleted: an open file on a network disk, or another owner."""
    real = shutil.rmtree

    def rmtree(path: Path) -> None:
        if path.name in names:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path / ".nfs0001"))
        real(path)

    return rmtree


def test_what_cannot_be_removed_keeps_nothing_from_being_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stays = ["step_00000001.removing", "step_00000001.2.removing", "step_00000004.saving.removing"]
    monkeypatch.setattr("shutil.rmtree", busy(*stays))
    for _ in range(2):  # a run that went back saves the step again, and deletes it again
        store.remove([write(tmp_path, 1)])
    store.temporary_of(store.folder_of(tmp_path, 4)).mkdir()
    (store.temporary_of(store.folder_of(tmp_path, 4)) / "__0_0.distcp").touch()
    for step in (2, 3, 4):
        assert write(tmp_path, step) == store.latest(tmp_path)
    assert list(damages(tmp_path / "step_00000004")) == []
    assert sorted(path.name for path in tmp_path.glob("*.*")) == sorted(stays)
    told = capsys.readouterr().err
    assert [told.count(f"{name} could not be removed") for name in stays] == [1, 1, 1], "each is said once"
    monkeypatch.undo()
    write(tmp_path, 5)
    assert list(tmp_path.glob("*.*")) == [], "and tried again"


def test_a_folder_in_the_way_of_a_save_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = store.temporary_of(store.folder_of(tmp_path, 4))
    temporary.mkdir()

    def rename(path: Path, target: Path) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(PermissionError, match="step_00000004.saving"):
        write(tmp_path, 4)


def test_without_latest_it_is_what_was_saved_last(tmp_path: Path) -> None:
    """A copy without it, or a run that was killed between its first checkpoint and `latest`."""
    for step, at in ((1, 10.0), (3, 20.0), (2, 30.0), (4, 40.0)):
        write(tmp_path, step, saved_at=at)
    (tmp_path / "latest").unlink()
    assert store.latest(tmp_path) == tmp_path / "step_00000004"
    (tmp_path / "step_00000004" / "state.json").write_text("{}")
    assert store.latest(tmp_path) == tmp_path / "step_00000002", "one that cannot be read is nobody's choice"


def test_weights_that_a_pointer_no_longer_names(tmp_path: Path) -> None:
    first = write(tmp_path, 1, store.WEIGHTS, (store.BEST,))
    assert store.weights_named_by(tmp_path, (store.BEST,)) == [first]
    write(tmp_path, 2, store.WEIGHTS, (store.BEST,), final=True)
    assert store.weights_named_by(tmp_path, (store.BEST,)) == [], "weights of the end of a run stay"
    (store.folder_of(tmp_path, 2, store.WEIGHTS) / "state.json").write_text("{}")
    assert store.weights_named_by(tmp_path, (store.BEST,)) == [], "and those that cannot be read"
    write(tmp_path, 3)
    assert store.weights_named_by(tmp_path, (store.LATEST,)) == [], "a checkpoint goes by the rules of retention"
