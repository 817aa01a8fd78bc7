"""Our reading and writing of safetensors against the format's own library."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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
