"""A disk that was away for a moment says nothing of a checkpoint: another start may read it."""

from __future__ import annotations

import builtins
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.checkpoint import store
from moe_train.checkpoint.index import INDEX, read_index
from moe_train.checkpoint.loading import load
from moe_train.checkpoint.slices import OwnedSlice
from moe_train.checkpoint.state import STATE, read_state
from moe_train.checkpoint.verify import damages
from moe_train.checkpoint.writing import LazyBox, write_boxes
from moe_train.parallel.passing import may_pass


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    final = store.folder_of(tmp_path, 3)
    values = torch.arange(3.0)
    index = write_boxes(
        store.begin(tmp_path, final), "__0_", [LazyBox("model.a", (3,), (0,), (3,), torch.float32, lambda: values)]
    )
    store.finish(store.temporary_of(final), index, {"step": 3})
    store.put_in_place(final, (store.LATEST,))
    return final


def failing(real: Callable[..., Any], number: int, wanted: Callable[[Any], bool]) -> Callable[..., Any]:
    """Instead of a function whose first argument names what is read."""

    def function(what: Any, *args: Any, **options: Any) -> Any:
        if wanted(what):
            raise OSError(number, os.strerror(number))
        return real(what, *args, **options)

    return function


def away(patch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Files of this name cannot be opened."""
    for module in (builtins, os):
        patch.setattr(module, "open", failing(module.open, number, lambda path: Path(str(path)).name == name))
    for read in ("read_text", "read_bytes"):
        patch.setattr(Path, read, failing(getattr(Path, read), number, lambda path: path.name == name))


def filled(checkpoint: Path, verify: bool) -> list[float]:
    values = torch.zeros(3)
    load(checkpoint, [OwnedSlice("model.a", (3,), 0, values)], {"model.a": (3,)}, verify=verify)
    return values.tolist()


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", [STATE, INDEX, "__0_0.distcp"])
def test_loading(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str, verify: bool) -> None:
    assert (checkpoint / name).is_file() and filled(checkpoint, verify) == [0.0, 1.0, 2.0]
    for number in (errno.ESTALE, errno.EIO):
        with monkeypatch.context() as patch:
            away(patch, name, number)
            with pytest.raises(
                OSError, match=f"{checkpoint} cannot be read now.*{os.strerror(number)}.*again"
            ) as error:
                filled(checkpoint, verify)
            assert may_pass(error.value)
    away(monkeypatch, name, errno.ENOENT)
    with pytest.raises(ValueError, match=os.strerror(errno.ENOENT)):
        filled(checkpoint, verify)


@pytest.mark.parametrize("verify", [True, False])
def test_loading_what_can_be_opened_but_not_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    """zipfile calls that no archive."""
    for function in ("pread", "preadv"):
        monkeypatch.setattr(os, function, failing(getattr(os, function), errno.EIO, lambda _: True))
    with pytest.raises(OSError) as error:
        filled(checkpoint, verify)
    assert may_pass(error.value)


@pytest.mark.parametrize(("name", "reader"), [(STATE, read_state), (INDEX, read_index)])
def test_reading(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str, reader: Callable[[Path], Any]) -> None:
    away(monkeypatch, name, errno.ESTALE)
    with pytest.raises(OSError) as error:
        reader(checkpoint)
    assert may_pass(error.value)


def test_no_older_checkpoint_is_gone_on_with(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `latest` is missing, and the newest one is away."""
    (checkpoint.parent / store.LATEST).unlink()
    away(monkeypatch, STATE, errno.EIO)
    with pytest.raises(OSError) as error:
        store.latest(checkpoint.parent)
    assert may_pass(error.value)


def test_nobody_judges_what_is_away(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save neither removes it nor fails."""
    assert [one.step for one in store.readable(checkpoint.parent)] == [3]
    away(monkeypatch, STATE, errno.EIO)
    assert store.readable(checkpoint.parent) == []


def test_verifying_goes_on_with_the_other_files(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away(monkeypatch, "__0_0.distcp", errno.EIO)
    assert list(damages(checkpoint)) == [f"__0_0.distcp cannot be read ({os.strerror(errno.EIO)})"]
