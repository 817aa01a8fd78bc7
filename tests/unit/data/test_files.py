"""Small files that are replaced as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.data.files import write_atomically
from tests.unit.little_room import little_room


def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, b"old")
    with pytest.raises(OSError, match=f"File too large: '{path}'"), little_room(4096):
        write_atomically(path, bytes(10_000))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/away/state.json"):
        write_atomically(tmp_path / "away" / "state.json", b"new")
