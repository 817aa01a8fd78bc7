"""Writing a checkpoint of weights in one process, one piece in memory at a time."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from moe_train.checkpoint.store import FORMAT, STATE
from moe_train.data.files import sync, write_atomically

_FILE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class LazyBox:
    """An N-dimensional part of the global tensor ``key`` whose values are fetched when they are written."""

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Returns a contiguous tensor on the CPU with these values in any shape."""


def write_weights(root: Path, step: int, boxes: Iterable[LazyBox], state: dict[str, Any]) -> Path:
    """Writes root/step_XXXXXXXX and root/latest, in this process alone; files are on the disk when it returns.

    The boxes of a key must be disjoint, cover it, and have one type. They are read in the order given. What fails
    leaves a part behind: write into a folder that is moved to its place afterwards.

    Errors: OSError where it cannot be written; whatever ``LazyBox.read`` raises.
    """
    directory = root / f"step_{step:08d}"
    directory.mkdir(parents=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*single process.*")
            dcp.save({}, storage_writer=_Writer(directory), planner=_Planner(boxes), no_dist=True)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
    text = json.dumps({"format": FORMAT, "step": step, **state, "weights_only": True}, indent=1)
    write_atomically(directory / STATE, text.encode())
    write_atomically(root / "latest", directory.name.encode())
    return directory


def untrained_state(config: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint of weights that no step was taken with; ``config``: of its run."""
    return {
        "consumed_samples": 0,
        "tokens": 0,
        "samples": {},
        "optimizer_steps": 0,
        "layout": {"processes": 1, "expert": 1, "zero_stage": 1, "device": "cpu"},
        "config": config,
        "history": [],
    }


class _Planner(DefaultSavePlanner):
    def __init__(self, boxes: Iterable[LazyBox]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.boxes = {MetadataIndex(box.key, torch.Size(box.offsets)): box for box in boxes}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict = {}
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_item(index, box) for index, box in self.boxes.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        box = self.boxes[MetadataIndex(index.fqn, index.offset)]
        return box.read().view(box.sizes)


def _item(index: MetadataIndex, box: LazyBox) -> WriteItem:
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes)),
        properties=TensorProperties(dtype=box.dtype),
        size=torch.Size(box.shape),
    )
    return WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)


class _Writer(dcp.FileSystemWriter):
    """Upstream's writer keeps the last tensor of each name until all are written; this one keeps none."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=True)
        self.folder = path

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with _without_checksums():
            return self._write_files(plan, planner)

    def _write_files(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        waiting = list(reversed(plan.items))
        number = 0
        while waiting:
            name = f"{plan.storage_data.prefix}{number}.distcp"
            with open(self.folder / name, "wb") as file:
                stream = _Stream(file)
                while waiting and stream.position < _FILE_BYTES:
                    results.append(_write(stream, name, waiting.pop(), planner))
                file.flush()
                os.fsync(file.fileno())
            number += 1
        sync(self.folder)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


@contextmanager
def _without_checksums() -> Iterator[None]:
    """torch.save computes CRC-32 of all values, which nothing reads and which takes as long as writing them."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Stream:
    """What torch.save writes to; remembers why writing failed, which torch hides behind an error of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.position = file, 0
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            count = self.file.write(content)
        except OSError as error:
            self.error = error
            raise
        self.position += count
        return count

    def flush(self) -> None:
        pass


def _write(stream: _Stream, name: str, item: WriteItem, planner: SavePlanner) -> WriteResult:
    begin = stream.position
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor)
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()
    try:
        torch.save(tensor, stream)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise stream.error or error from None
    length = stream.position - begin
    return WriteResult(item.index, length, _StorageInfo(name, begin, length))
