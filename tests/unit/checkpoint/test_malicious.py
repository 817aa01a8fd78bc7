"""Nothing that is in a checkpoint runs when it is read, and its names lead nowhere else."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from moe_train.checkpoint import store
from moe_train.checkpoint.index import INDEX, read_index
from moe_train.checkpoint.loading import load
from moe_train.checkpoint.reading import StoredTensors
from moe_train.checkpoint.slices import OwnedSlice
from moe_train.checkpoint.state import STATE, read_state
from moe_train.checkpoint.verify import damages
from tests.reference.malicious import payload, poison
from tests.unit.checkpoint.test_store import write


def test_the_payload_runs_where_it_is_unpickled(tmp_path: Path) -> None:
    """The other tests would pass with a payload that does nothing."""
    pickle.loads(payload(tmp_path / "canary"))
    assert (tmp_path / "canary").exists()
    checkpoint, second = write(tmp_path / "checkpoints", 3), tmp_path / "second"
    poison(checkpoint, second)
    box = read_index(checkpoint).boxes[0]
    content = (checkpoint / box.file).read_bytes()[box.start : box.start + box.length]
    (tmp_path / "archive").write_bytes(content)
    with pytest.raises((RuntimeError, pickle.UnpicklingError, TypeError, AttributeError)):
        torch.load(tmp_path / "archive", weights_only=False).shape  # noqa: B018  it is what os.mkdir returned
    assert second.exists()


def test_a_checkpoint_full_of_pickles_is_read_without_running_them(tmp_path: Path) -> None:
    checkpoint, canary = write(tmp_path, 3), tmp_path / "canary"
    poison(checkpoint, canary)
    assert list(damages(checkpoint)) == [] and read_state(checkpoint)["step"] == 3
    out = torch.zeros(3)
    with StoredTensors(checkpoint) as stored:
        stored.read("model.a", (0,), out)
    assert out.tolist() == [3.0, 3.0, 3.0]
    again = torch.zeros(3)
    load(checkpoint, [OwnedSlice("model.a", (3,), 0, again)], {"model.a": (3,)})
    assert again.tolist() == [3.0, 3.0, 3.0]
    assert not canary.exists()


@pytest.mark.parametrize("pointer", [store.LATEST, store.BEST])
@pytest.mark.parametrize("name", ["../weights_00000001", "/tmp", ".", "", "weights_1/../../x", "step_00000001\nmore"])
def test_a_pointer_names_a_checkpoint_beside_it(tmp_path: Path, pointer: str, name: str) -> None:
    """What `best` names is deleted when it is not the best any more."""
    root, outside = tmp_path / "checkpoints", tmp_path / "weights_00000001"
    write(root, 1, store.WEIGHTS, (store.BEST,))
    outside.mkdir()
    (root / pointer).write_text(name)
    with pytest.raises(ValueError, match="which is no checkpoint"):
        store.named_by(root, pointer)


@pytest.mark.parametrize("file", ["../x.distcp", "/etc/passwd", ".hidden", "a/b.distcp", "", "..", "x\x00y"])
def test_a_file_of_a_checkpoint_lies_in_it(tmp_path: Path, file: str) -> None:
    checkpoint = write(tmp_path, 3)
    content = json.loads((checkpoint / INDEX).read_text())
    name = next(iter(content["files"]))
    content["files"][file] = content["files"].pop(name)
    content["tensors"]["model.a"]["boxes"][0][2] = file
    (checkpoint / INDEX).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is no name of a file in it"):
        read_index(checkpoint)


@pytest.mark.parametrize("reader", [read_index, read_state])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"files": [], "tensors": {}}',
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"format": 3}',
        b"1e999",
    ],
)
def test_what_is_no_index_or_state_is_refused(tmp_path: Path, reader, content: bytes) -> None:
    checkpoint = write(tmp_path, 3)
    (checkpoint / (INDEX if reader is read_index else STATE)).write_bytes(content)
    with pytest.raises(ValueError, match=str(checkpoint)):
        reader(checkpoint)


@pytest.mark.parametrize(
    "boxes",
    [
        [[[0], [4], 0, 0, 9]],
        [[[0, 0], [3, 1], 0, 0, 9]],
        [[[-1], [3], 0, 0, 9]],
        [[[0], [3], 0, -5, 9]],
        [[[0], [3], 0, 0, 10**15]],
        [[[0], [3], [], 0, 9]],
        [[[0], [3], {}, 0, 9]],
        [[[0], [2], 0, 0, 9], [[0], [1], 0, 0, 9]],
        [[[0.0], [3], 0, 0, 9]],
        [[[True], [2], 0, 0, 9]],
        [5],
        {},
    ],
)
def test_boxes_that_cannot_be_are_refused(tmp_path: Path, boxes) -> None:
    """A 0 in the place of the file stands for the one that there is."""
    checkpoint = write(tmp_path, 3)
    content = json.loads((checkpoint / INDEX).read_text())
    name = next(iter(content["files"]))
    for box in boxes if isinstance(boxes, list) else []:
        if isinstance(box, list) and box[2] == 0:
            box[2] = name
    content["tensors"]["model.a"]["boxes"] = boxes
    (checkpoint / INDEX).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is damaged"):
        read_index(checkpoint)
