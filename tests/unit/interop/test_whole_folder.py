"""A folder is replaced whole or not at all, at whatever point the process is stopped or killed."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_train.interop.whole_folder import check_target, whole_folder


@pytest.fixture
def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write(target: Path, text: str) -> None:
    with whole_folder(target) as temporary:
        (temporary / "file").write_text(text)


def check(target: Path, force: bool = True, ours: Callable[[Path], bool] = lambda _: True) -> None:
    check_target(target, force=force, ours=ours, what="ours", folders=("known",))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("late", [False, True], ids=["before the rename", "behind the rename"])
@pytest.mark.parametrize("which", [1, 2])
def test_ctrl_c_at_the_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int, late: bool) -> None:
    write(tmp_path / "out", "old")
    calls, rename = 0, os.rename

    def stopped(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == which and not late:
            raise KeyboardInterrupt
        rename(source, target)
        if calls == which:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", stopped)
    if (which, late) == (2, True):
        write(tmp_path / "out", "new")  # too late: everything was done, and is not reported as undone
    else:
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "file").read_text() == ("new" if (which, late) == (2, True) else "old")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_the_old_folder_is_removed_when_all_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    write(tmp_path / "out", "old")

    def fails(path: Path, **_: Any) -> None:
        raise error

    with monkeypatch.context() as context:
        context.setattr(os, "rmdir", fails)
        write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "file").read_text() == "new" and len(names(tmp_path)) == 2
    write(tmp_path / "out", "newer")
    assert names(tmp_path) == ["out"]


def test_what_a_killed_process_has_moved_away_comes_back(tmp_path: Path, gone: int) -> None:
    out = tmp_path / "out"
    write(out, "old")
    out.rename(tmp_path / f".out.old.{platform.node()}.{gone}.partial")
    half = tmp_path / f".out.new.{platform.node()}.{gone}.partial"
    half.mkdir()
    with pytest.raises(ValueError, match="exists already"):
        check(out, force=False)
    assert (out / "file").read_text() == "old"
    write(out, "new")
    assert names(tmp_path) == ["out"]


def test_only_what_processes_that_are_gone_left_for_the_same_name_is_touched(tmp_path: Path, gone: int) -> None:
    here = platform.node()
    kept = [
        f".out.old.elsewhere.{gone}.partial",
        f".out.old.{here}.{os.getppid()}.partial",
        f".out.b.old.{here}.{gone}.partial",
        f".out.old.new.{here}.{gone}.partial",
        f".o[u]t.old.{here}.{gone}.partial",
    ]
    for name in kept:
        (tmp_path / name).mkdir()
    check(tmp_path / "out")
    write(tmp_path / "out", "new")
    assert names(tmp_path) == sorted([*kept, "out"]) and (tmp_path / "out" / "file").read_text() == "new"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for text in ("first", "second"):
        check(tmp_path / "link")
        write(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").read_text() == text
    assert names(tmp_path) == ["link", "real"]


def test_what_cannot_be_replaced_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").touch()
    for name, message in [("dangling", "nowhere"), ("file", "is a file")]:
        with pytest.raises(ValueError, match=message):
            check(tmp_path / name)
    with pytest.raises(ValueError, match="mount point"):
        check(Path("/proc"))
    with pytest.raises(ValueError, match="^/ is a mount point"):
        check(Path("/"))


def test_force_replaces_only_what_is_ours_to_the_last_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "known").mkdir(parents=True)
    check(out)
    with pytest.raises(ValueError, match="exists already"):
        check(out, force=False)
    with pytest.raises(ValueError, match="is not ours"):
        check(out, ours=lambda _: False)
    (out / "mine").mkdir()
    with pytest.raises(ValueError, match="has a folder mine"):
        check(out)
    shutil.rmtree(out / "mine")
    (out / "known2").symlink_to("known")
    with pytest.raises(ValueError, match="has a folder known2"):
        check(out)


@pytest.mark.parametrize("there", [False, True])
def test_what_another_process_has_put_there_meanwhile_stays(tmp_path: Path, there: bool) -> None:
    """A run that was begun in the folder while hours of conversion went on."""
    out = tmp_path / "out"
    if there:
        write(out, "old")
        os.utime(out, (0, 0))
    with pytest.raises(ValueError, match="out was changed by another process"), whole_folder(out) as temporary:
        (temporary / "file").write_text("new")
        out.mkdir(exist_ok=True)
        (out / "metrics.jsonl").touch()
    assert names(out) == ["file", "metrics.jsonl"][not there :] and names(tmp_path) == ["out"]
