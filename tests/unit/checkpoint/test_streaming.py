"""Weights written piece by piece, and any box of any checkpoint read back."""

from __future__ import annotations

import gc
import secrets
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from moe_train.checkpoint.reading import StoredTensors
from moe_train.checkpoint.state import read_state
from moe_train.checkpoint.store import checkpoint_at, latest
from moe_train.checkpoint.streaming import write_weights
from moe_train.checkpoint.verify import damages
from moe_train.checkpoint.writing import LazyBox


def boxes(key: str, whole: Tensor, cuts: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[LazyBox]:
    def part(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        return whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].contiguous()

    shape = tuple(whole.shape)
    return [LazyBox(key, shape, o, s, whole.dtype, lambda o=o, s=s: part(o, s)) for o, s in cuts]


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    seed = secrets.randbits(31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    tensors = {"model.a": torch.randn(6, 4, 5), "model.b": torch.randn(7).bfloat16(), "model.c": torch.randn(())}
    cuts = boxes(
        "model.a", tensors["model.a"], [((0, 0, 0), (6, 4, 2)), ((0, 0, 2), (2, 4, 3)), ((2, 0, 2), (4, 4, 3))]
    )
    cuts += boxes("model.b", tensors["model.b"], [((3,), (4,)), ((0,), (3,))])
    cuts += boxes("model.c", tensors["model.c"], [((), ())])
    return write_weights(tmp_path, 0, cuts, {"tokens": 0}), tensors


def test_torch_reads_it(written: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    directory, tensors = written
    got = {key: torch.zeros_like(value) for key, value in tensors.items()}
    dcp.load(got, checkpoint_id=str(directory), no_dist=True)
    assert all(torch.equal(got[key], tensors[key]) for key in tensors)
    assert latest(tmp_path) == directory and read_state(directory)["weights_only"] is True


def test_any_box_is_read_in_any_type(written: tuple[Path, dict[str, Tensor]]) -> None:
    directory, tensors = written
    a = tensors["model.a"]
    with StoredTensors(directory) as stored:
        assert stored.shapes == {key: tuple(value.shape) for key, value in tensors.items()}
        for _ in range(30):
            low = [int(torch.randint(0, n, ())) for n in a.shape]
            sizes = [int(torch.randint(1, n - b + 1, ())) for n, b in zip(a.shape, low, strict=True)]
            out = torch.empty(sizes, dtype=torch.float64)
            stored.read("model.a", tuple(low), out)
            assert out.float().equal(a[tuple(slice(b, b + n) for b, n in zip(low, sizes, strict=True))])
        b, c = torch.empty(7), torch.empty(())
        stored.read("model.b", (0,), b)
        stored.read("model.c", (), c)
        assert b.equal(tensors["model.b"].float()) and c.equal(tensors["model.c"])


def test_one_piece_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """torch's own writer keeps the last tensor of every name."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def read() -> Tensor:
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        tensor = torch.ones(10)
        alive.append(weakref.ref(tensor))
        return tensor

    write_weights(tmp_path, 0, [LazyBox(f"model.{n}", (10,), (0,), (10,), torch.float32, read) for n in range(9)], {})
    assert len(alive) == 9 and most <= 1


def test_a_damaged_file_is_told(written: tuple[Path, dict[str, Tensor]]) -> None:
    directory, _ = written
    file = next(directory.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:300])
    with StoredTensors(directory) as stored, pytest.raises(ValueError, match="damaged"):
        stored.read("model.a", (0, 0, 0), torch.empty(6, 4, 5))
    (directory / "index.json").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        StoredTensors(directory)


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_flipped_bit_is_told(written: tuple[Path, dict[str, Tensor]], place: str) -> None:
    directory, _ = written
    assert list(damages(directory)) == []
    file = next(directory.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    position = {"first": 0, "middle": len(content) // 2, "last": len(content) - 1}[place]
    content[position] ^= 4
    file.write_bytes(content)
    assert list(damages(directory)) == [f"{file.name} is damaged: its checksum is another one"]


def test_every_damage_is_told(written: tuple[Path, dict[str, Tensor]]) -> None:
    directory, _ = written
    file = next(directory.glob("*.distcp"))
    file.write_bytes(file.read_bytes() + b"x")
    assert "bytes, and" in next(damages(directory))
    file.unlink()
    assert "cannot be read" in next(damages(directory))
    index = directory / "index.json"
    index.write_text(index.read_text().replace(" ", "") + " ")
    assert "not the one that belongs" in next(damages(directory))
    index.write_text("{")
    assert "index.json" in next(damages(directory))


def test_files_have_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_train.checkpoint.writing._FILE_BYTES", 3000)
    values = torch.randn(9, 100)
    cuts = boxes("model.a", values, [((n, 0), (1, 100)) for n in range(9)])
    directory = write_weights(tmp_path, 0, cuts, {})
    assert len(list(directory.glob("*.distcp"))) > 2 and list(damages(directory)) == []
    with StoredTensors(directory) as stored:
        out = torch.empty(9, 100)
        stored.read("model.a", (0, 0), out)
    assert out.equal(values)


def test_a_path_names_a_checkpoint(written: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    directory, _ = written
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint_at(run)
    (run / "checkpoints").symlink_to(tmp_path)
    assert checkpoint_at(directory) == directory
    assert checkpoint_at(run).name == checkpoint_at(run, 0).name == directory.name
    with pytest.raises(ValueError, match="of step 3 .there: step_00000000"):
        checkpoint_at(run, 3)
