from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.training.guard.left_out import (
    REWINDS,
    Rewind,
    from_plain,
    left_out,
    merged,
    read_rewinds,
    to_plain,
    write_rewinds,
)

ONE = Rewind(bad_step=7, to_step=3, first=5, cause="spike")
TWO = Rewind(bad_step=20, to_step=12, first=20, cause="gradient")


def test_which_steps_are_left_out() -> None:
    assert [step for step in range(1, 30) if left_out([ONE, TWO], step)] == [5, 6, 7, 20]
    assert not left_out([], 1)


def test_the_file(tmp_path: Path) -> None:
    assert read_rewinds(tmp_path) == []
    write_rewinds(tmp_path, [ONE, TWO])
    assert read_rewinds(tmp_path) == [ONE, TWO]
    assert [path.name for path in tmp_path.iterdir()] == [REWINDS]
    (tmp_path / REWINDS).write_text('{"rewinds": [{"bad_step"')
    with pytest.raises(ValueError, match=r"rewinds\.json is damaged"):
        read_rewinds(tmp_path)


def test_what_a_checkpoint_and_the_file_know() -> None:
    assert merged([TWO], from_plain(to_plain([ONE, TWO]))) == [ONE, TWO]
