"""index.json: what it says comes back, and what cannot be is refused before a byte is read."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.checkpoint.index import Index, StoredBox, StoredFile, StoredTensor, index_bytes, merge, read_index


def part(*boxes: StoredBox, shape: tuple[int, ...] = (4, 3), dtype: torch.dtype = torch.float32) -> Index:
    files = {box.file: StoredFile(1000, "0" * 32) for box in boxes}
    return Index({box.key: StoredTensor(dtype, shape) for box in boxes}, list(boxes), files)


def box(offsets: tuple[int, ...], sizes: tuple[int, ...], file: str = "__0_0.distcp") -> StoredBox:
    return StoredBox("model.a", offsets, sizes, file, 0, 100)


UPPER, LOWER = box((0, 0), (2, 3)), box((2, 0), (2, 3), "__1_0.distcp")


def test_parts_become_a_whole_that_comes_back(tmp_path: Path) -> None:
    whole = merge([part(UPPER), part(LOWER), Index()])
    assert whole.shapes == {"model.a": (4, 3)} and len(whole.files) == 2
    (tmp_path / "index.json").write_bytes(index_bytes(whole))
    assert read_index(tmp_path) == whole


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([part(UPPER)], "6 elements of model.a are stored, and it has 12"),
        ([part(UPPER), part(UPPER)], "a part of model.a is stored twice"),
        ([part(UPPER), part(box((1, 0), (2, 3)))], "stored twice"),
        ([part(box((0, 0), (4, 2))), part(box((0, 1), (4, 1)))], "stored twice"),
        ([part(UPPER), part(LOWER, shape=(5, 3))], "on one rank and"),
        ([part(UPPER), part(LOWER, dtype=torch.bfloat16)], "on one rank and"),
    ],
)
def test_what_ranks_wrote_must_fit(parts: list[Index], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge(parts)


def test_boxes_beside_each_other_do_not_overlap() -> None:
    rows = [box((0, 0), (1, 3)), box((1, 0), (1, 1)), box((1, 1), (1, 2)), box((2, 0), (2, 3))]
    assert len(merge([part(*rows)]).boxes) == 4
    scalar = StoredBox("model.a", (), (), "f", 0, 9)
    assert merge([part(scalar, shape=())]).shapes == {"model.a": ()}
    with pytest.raises(ValueError):
        merge([part(scalar, shape=()), part(scalar, shape=())])


GOOD: dict[str, Any] = merge([part(UPPER), part(LOWER)]).to_json()


def changed(path: list[Any], value: Any) -> Any:
    content = copy.deepcopy(GOOD)
    inner: Any = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return content


TENSOR = ["tensors", "model.a"]


@pytest.mark.parametrize(
    "content",
    [
        *([], {}, 5, None, {"tensors": {}}, {"files": {}, "tensors": []}),
        changed(["files"], {"../../etc/passwd": {"bytes": 1000, "xxh3": ""}}),
        changed(["files"], {"/etc/passwd": {"bytes": 1000, "xxh3": ""}}),
        changed(["files"], {"..": {"bytes": 1000, "xxh3": ""}}),
        changed(["files", "__0_0.distcp", "bytes"], -1),
        changed(["files", "__0_0.distcp", "bytes"], 50),
        changed(["files", "__0_0.distcp"], "x"),
        changed([*TENSOR, "dtype"], "object"),
        changed([*TENSOR, "dtype"], ["float32"]),
        changed([*TENSOR, "shape"], [4, -3]),
        changed([*TENSOR, "shape"], [4, 3.0]),
        changed([*TENSOR, "shape"], [4, True]),
        changed([*TENSOR, "shape"], [12]),
        changed([*TENSOR, "shape"], None),
        changed([*TENSOR, "boxes"], []),
        changed([*TENSOR, "boxes", 0], [[0, 0], [2, 3], "elsewhere.distcp", 0, 100]),
        changed([*TENSOR, "boxes", 0], [[0, 0], [2, 3], ["x"], 0, 100]),
        changed([*TENSOR, "boxes", 0], [[0, 0], [9, 3], "__0_0.distcp", 0, 100]),
        changed([*TENSOR, "boxes", 0, 3], 10**30),
        changed([*TENSOR, "boxes", 0], [0]),
    ],
    ids=range(25),
)
def test_what_cannot_be_is_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"checkpoint {tmp_path}: index.json is damaged"):
        read_index(tmp_path)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="index.json"):
        read_index(tmp_path)
    (tmp_path / "index.json").write_bytes(b"\x80\x04\x95")
    with pytest.raises(ValueError, match="index.json"):
        read_index(tmp_path)
