"""Reading and refusing checkpoints on disk, without processes; saving is tested with several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from moe_train.checkpoint import store
from moe_train.checkpoint.planners import check_geometry


def metadata(shapes: dict[str, tuple[int, ...]]) -> Metadata:
    def tensor(shape: tuple[int, ...]) -> TensorStorageMetadata:
        chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=torch.Size(shape))
        return TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(shape), [chunk])

    return Metadata(state_dict_metadata={key: tensor(shape) for key, shape in shapes.items()})


def test_the_same_geometry_passes() -> None:
    shapes = {"model.a": (2, 3), "exp_avg.a": (2, 3)}
    check_geometry(metadata(shapes), shapes, "here")


def test_kinds_that_nobody_wants_are_no_problem() -> None:
    """Weights alone from a checkpoint that holds moments and generators too."""
    check_geometry(metadata({"model.a": (2,), "exp_avg.a": (2,), "rng.0": (5,)}), {"model.a": (2,)}, "here")


@pytest.mark.parametrize(
    ("stored", "expected", "message"),
    [
        ({"model.a": (2,)}, {"model.a": (2,), "model.b": (3,)}, "missing in the checkpoint: model.b"),
        ({"model.a": (2,), "model.b": (3,)}, {"model.a": (2,)}, "not in this model: model.b"),
        (
            {"model.a": (2, 3)},
            {"model.a": (3, 2)},
            r"model.a: shape \(2, 3\) in the checkpoint, \(3, 2\) in this model",
        ),
    ],
)
def test_every_difference_is_named(
    stored: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(ValueError, match=f"/runs/x is of another model(.|\n)*{message}(.|\n)*config.yaml"):
        check_geometry(metadata(stored), expected, "/runs/x")


def test_a_long_list_of_differences_is_cut() -> None:
    expected = {f"model.{i:03}": (1,) for i in range(25)}
    with pytest.raises(ValueError, match="and 15 more") as caught:
        check_geometry(metadata({}), expected, "here")
    assert "model.009" in str(caught.value) and "model.010" not in str(caught.value)


def test_latest(tmp_path: Path) -> None:
    assert store.latest(tmp_path) is None
    (tmp_path / "step_00000005").mkdir()
    assert store.latest(tmp_path) is None, "a folder counts only once `latest` names it"
    (tmp_path / "latest").write_text("step_00000005\n")
    assert store.latest(tmp_path) == tmp_path / "step_00000005"
    (tmp_path / "latest").write_text("step_00000006")
    with pytest.raises(ValueError, match="step_00000006, which does not exist.*--resume"):
        store.latest(tmp_path)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "5", '{"format": 99, "step": 1}', '{"step": 1}'])
def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "state.json").write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        store.read_state(tmp_path)


def test_state_comes_back(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"format": store.FORMAT, "step": 3, "tokens": 2**40}))
    assert store.read_state(tmp_path)["tokens"] == 2**40


@pytest.mark.parametrize("content", [{"step": 3}, {"config": [], "step": 3}, {"config": {}, "step": "3"}])
def test_what_is_needed_of_a_state_is_there(tmp_path: Path, content: dict[str, object]) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"format": store.FORMAT, **content}))
    with pytest.raises(ValueError, match=f"{tmp_path}/state.json is damaged.*(config|step)"):
        store.read_state_with_config(tmp_path)
