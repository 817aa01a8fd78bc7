"""Our reading and writing of safetensors against the format's own library."""

from __future__ import annotations

import json
import random
import secrets
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moe_train.interop.hub_folder import tensors_of
from moe_train.interop.safetensors_file import DTYPES, read_header, write_file


def test_both_sides_read_what_the_other_writes(tmp_path: Path) -> None:
    seed = secrets.randbits(31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    shapes = [(), (1,), (5,), (3, 7), (0, 4), (2, 3, 5)]
    tensors = {
        f"{name}_{len(shape)}_{number}": torch.randint(0, 2, shape).to(dtype)
        for name, dtype in DTYPES.items()
        for number, shape in enumerate(shapes)
    }
    save_file(tensors, tmp_path / "theirs.safetensors")
    header = read_header(tmp_path / "theirs.safetensors")
    assert header.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(header[name].rows().view(torch.uint8), tensor.view(torch.uint8)) if tensor.dim() else True
        assert header[name].rows().dtype == tensor.dtype and header[name].rows().shape == tensor.shape
    assert header["F32_2_3"].rows(1, 3).equal(tensors["F32_2_3"][1:3])
    write_file(
        tmp_path / "ours.safetensors", {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, tensors.__getitem__
    )
    again = load_file(tmp_path / "ours.safetensors")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and again[name].float().equal(tensor.float())


def test_damage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(10)}, path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"[10]", b"[11]"))
    with pytest.raises(ValueError, match="a is 44 bytes of values, not 40"):
        read_header(path)
    path.write_bytes(content.replace(b'"F32"', b'"X32"'))
    with pytest.raises(ValueError, match="a has type X32"):
        read_header(path)


def file_of(header: Any, values: bytes = bytes(48)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


def entry(first: int, last: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(last - first) // 4], "data_offsets": [first, last], **changes}


DOUBLE = (
    b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]},"a":{"dtype":"F32","shape":[6],"data_offsets":[24,48]}}'
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (file_of([]), "its header is no object"),
        (file_of({"a": 1}), "a has no dtype"),
        (file_of({"a": {"dtype": "F32", "shape": [12]}}), "a has no data_offsets"),
        (file_of({"a": entry(0, 48, shape=None)}), "a has shape None"),
        (file_of({"a": entry(0, 48, shape=[12.0])}), r"a has shape \[12.0\]"),
        (file_of({"a": entry(0, 48, shape=[-12, -1])}), r"a has shape \[-12, -1\]"),
        (file_of({"a": entry(0, 48, dtype=[])}), r"a has type \[\], which torch lacks"),
        (file_of({"a": entry(0, 48, data_offsets=None)}), "a has data_offsets None"),
        (file_of({"a": entry(0, 48, data_offsets=[1])}), r"a has data_offsets \[1\]"),
        (file_of({"a": entry(0, 48, data_offsets=["0", "48"])}), r"a has data_offsets \['0', '48'\]"),
        (file_of({"a": entry(0, 48, data_offsets=[-48, 0])}), r"a has data_offsets \[-48, 0\]"),
        (file_of({"a": entry(0, 48, data_offsets=[48, 0])}), r"a has data_offsets \[48, 0\]"),
        (file_of({"a": entry(0, 24), "b": entry(20, 48)}), "values of b begin at byte 20, not at 24"),
        (file_of({"a": entry(0, 20), "b": entry(24, 48)}), "values of b begin at byte 24, not at 20"),
        (file_of({"a": entry(0, 24), "b": entry(0, 24)}), "values of b begin at byte 0, not at 24"),
        (file_of(DOUBLE), "a is there twice"),
        (file_of({"a": entry(0, 40)}), "8 bytes behind the values of a"),
        (file_of({}), "48 bytes behind its header"),
        (file_of({"a": entry(0, 96)}), "ends before the values of a"),
        (file_of(b"[" * 10**5), "its header cannot be read"),
        (file_of(b"\xff\xff"), "its header cannot be read"),
    ],
)
def test_every_damage_is_told_with_file_and_tensor(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        read_header(path)


def test_whatever_is_accepted_is_accepted_by_the_library(tmp_path: Path) -> None:
    """Values of headers are exchanged at random, and bytes of the file turned."""
    seed = secrets.randbits(31)
    print(f"seed {seed}")
    chance = random.Random(seed)
    path = tmp_path / "x.safetensors"
    fields = ("dtype", "shape", "data_offsets")
    values = [None, "F32", "x", -1, 0, True, 1.5, [], [0], [1], [3], [0, 12], [12, 16], [0, 1e9], [2**63, 2], [[1]], {}]
    accepted = 0
    for number in range(600):
        header: dict[str, Any] = {"a": entry(0, 12), "b": entry(12, 16, shape=[]), "c": entry(16, 48, shape=[2, 4])}
        for _ in range(number % 3):
            header[chance.choice("abc")][chance.choice(fields)] = chance.choice(values)
        content = bytearray(file_of(header))
        if number % 5 == 0:
            content[chance.randrange(len(content) - 48)] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            found = read_header(path)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        try:
            theirs = load_file(path)
        except SafetensorError as error:
            raise AssertionError(f"{bytes(content)!r}: {error}") from error
        accepted += 1
        assert {n: t.shape for n, t in found.items()} == {n: tuple(t.shape) for n, t in theirs.items()}
    assert accepted > 100


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": 5}, "a is in 5"),
        ({"a": None}, "a is in None"),
        ({"a": ["x"]}, r"a is in \['x'\]"),
        ({"a": ""}, "a is in ''"),
        ({"a": "../hub/x.safetensors"}, "a is in '../hub/x.safetensors'"),
        ({"a": "y.safetensors"}, "lacks y.safetensors"),
        ({"a": "x.safetensors", "b": "x.safetensors"}, "disagree about b"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_an_index_that_is_damaged(tmp_path: Path, weight_map: Any, message: str) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "x.safetensors").write_bytes(file_of({"a": entry(0, 48)}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=f"{folder}.*{message}"):
        tensors_of(folder)
