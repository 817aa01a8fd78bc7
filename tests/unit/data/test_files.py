"""Small files that are replaced as a whole."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_train.data.files import write_atomically


@pytest.fixture
def little_room() -> Iterator[None]:
    """No file of this process may become longer than 4 KiB: writing fails as on a full disk, in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path, little_room: None) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, b"old")
    with pytest.raises(OSError, match=f"File too large: '{path}'"):
        write_atomically(path, bytes(10_000))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/away/state.json"):
        write_atomically(tmp_path / "away" / "state.json", b"new")
