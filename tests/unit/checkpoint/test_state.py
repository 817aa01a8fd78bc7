"""state.json: what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.checkpoint.state import FORMAT, has_index, read_state, read_state_with_config, state_bytes


def test_it_comes_back(tmp_path: Path) -> None:
    content = {"step": 3, "tokens": 2**40, "pair": (1, 2), "by_number": {10: "a", 9: "b"}, "lr": 0.1}
    (tmp_path / "state.json").write_bytes(state_bytes(content, b"index"))
    state = read_state(tmp_path)
    assert state["tokens"] == 2**40 and state["pair"] == [1, 2] and state["by_number"] == {"10": "a", "9": "b"}
    assert has_index(state, b"index") and not has_index(state, b"another")


@pytest.mark.parametrize("content", [None, "", "{", "[]", "5", '{"format": 99, "step": 1}', '{"step": 1}'])
def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "state.json").write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_state(tmp_path)


def test_an_earlier_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"format": 2, "step": 5}')
    with pytest.raises(
        ValueError, match=f"has checkpoint format 2; this version reads {FORMAT}: go on with the version"
    ):
        read_state(tmp_path)


def test_a_changed_digit_is_told(tmp_path: Path) -> None:
    text = state_bytes({"step": 30, "consumed_samples": 480}, b"").decode()
    (tmp_path / "state.json").write_text(text.replace("480", "430"))
    with pytest.raises(ValueError, match="state.json is damaged: its checksum"):
        read_state(tmp_path)


@pytest.mark.parametrize("content", [{"step": 3}, {"config": [], "step": 3}, {"config": {}, "step": "3"}])
def test_what_is_needed_of_a_state_is_there(tmp_path: Path, content: dict[str, object]) -> None:
    (tmp_path / "state.json").write_bytes(state_bytes(content, b""))
    assert json.loads((tmp_path / "state.json").read_text())["format"] == FORMAT
    with pytest.raises(ValueError, match=f"{tmp_path}/state.json is damaged.*(config|step)"):
        read_state_with_config(tmp_path)
