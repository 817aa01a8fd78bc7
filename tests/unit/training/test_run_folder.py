"""A run is never overwritten silently."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.training.run_config import load_run_config
from moe_train.training.run_folder import CONFIG, default_run_dir, holds_run, load, prepare, started_from


def test_a_new_run_gets_its_configuration(tmp_path: Path) -> None:
    config = load_run_config("tiny")
    prepare(tmp_path / "a" / "b", config, None)
    assert load(tmp_path / "a" / "b") == config
    assert default_run_dir(config) == Path("runs/tiny")


def test_an_empty_folder_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    prepare(tmp_path, load_run_config("tiny"), None)
    assert load(tmp_path) == load_run_config("tiny")


def test_a_configuration_alone_is_no_run(tmp_path: Path) -> None:
    """It is kept, though."""
    (tmp_path / CONFIG).write_text("mine")
    prepare(tmp_path, load_run_config("tiny"), None)
    assert (tmp_path / "config.before_1.yaml").read_text() == "mine"
    assert not holds_run(tmp_path)


@pytest.mark.parametrize("content", ["metrics.jsonl", "checkpoints"])
def test_an_existing_run_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / content).write_text("old")
    with pytest.raises(ValueError, match=r"--resume auto.*--run-dir"):
        prepare(tmp_path, load_run_config("tiny"), None)
    assert (tmp_path / content).read_text() == "old"


def test_resume_auto_keeps_the_earlier_configuration(tmp_path: Path) -> None:
    first, second = load_run_config("tiny"), load_run_config("tiny", ["train.steps=20"])
    prepare(tmp_path, first, None)
    prepare(tmp_path, first, "auto")
    assert not list(tmp_path.glob("config.before_*"))
    prepare(tmp_path, second, "auto")
    prepare(tmp_path, first, "auto")
    assert load(tmp_path) == first
    assert [len(list(tmp_path.glob(f"config.before_{i}.yaml"))) for i in (1, 2, 3)] == [1, 1, 0]


def test_resume_auto_may_start_a_run(tmp_path: Path) -> None:
    prepare(tmp_path / "new", load_run_config("tiny"), "auto")
    assert load(tmp_path / "new") == load_run_config("tiny")
    assert started_from(tmp_path / "new") is None


def test_a_checkpoint_of_another_run_does_not_open_this_folder(tmp_path: Path) -> None:
    other = tmp_path / "other" / "checkpoints" / "step_00000100"
    other.mkdir(parents=True)
    prepare(tmp_path / "mine", load_run_config("tiny"), str(other))
    assert started_from(tmp_path / "mine") == other
    prepare(tmp_path / "mine", load_run_config("tiny"), None)
    assert started_from(tmp_path / "mine") is None
    (tmp_path / "mine" / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="holds a run already"):
        prepare(tmp_path / "mine", load_run_config("tiny"), str(other))


def test_an_own_checkpoint_does(tmp_path: Path) -> None:
    prepare(tmp_path, load_run_config("tiny"), None)
    checkpoint = tmp_path / "checkpoints" / "step_00000100"
    checkpoint.mkdir(parents=True)
    prepare(tmp_path, load_run_config("tiny"), str(checkpoint))


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such checkpoint"):
        prepare(tmp_path / "new", load_run_config("tiny"), str(tmp_path / "nothing"))
    assert not (tmp_path / "new").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        prepare(tmp_path / "file", load_run_config("tiny"), None)


def test_loading_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        load(tmp_path)
